"""
The four classic novels: their sources, and the rules that turn the raw files into clean texts.

The raw files come from two collections on GitHub, each at a fixed commit. All are UTF-8, but each has its own layout:
indents, blank lines, titles, a table of contents, an advertisement. A clean text is the novel alone, with one paragraph
or one line of verse per line. Errors of the sources are not corrected. The most frequent is a '?' for a lost character:
39 in 红楼梦, 512 in 水浒传, 11 in 三国演义.
"""
import functools
import re
from urllib.parse import quote

from core.text.download import fetch

SHU = 'https://raw.githubusercontent.com/shjwudp/shu/61aa02363241bcf32574708f1ff06ed698fb646b/books/'
# SHU has only a part of 三国演义
W2V = 'https://raw.githubusercontent.com/Seungberry/W2V/2208ad5e2963f3b844d97761cb310f127d93ec3d/'

# name: (title, url, sha256 of the clean text, [(pattern, replacement), ...]); the rules for this raw file, in order
NOVELS = {
    'hongloumeng': (
        '红楼梦', SHU + quote('红楼梦.txt'), 'bc22d94efccb7ebfc242342e9ec5db10fa308045439056e959d7ef1ffb9744af', [
            # spaces inside lines too: half and full width ones separate the parts of headings and the poets' names
            (r'[ \u3000]', ''),
            # join the 14 lines of songs in chapter 5 to the line above: the reference article's 875,372 characters
            (r'\n〔', '〔'),
        ]),
    'sanguo': (
        '三国演义', W2V + 'sanguoyanyi.txt', 'fa5dbfef677b6dae5afe9abf87208aa62b7eac77d55b142b959630e82bbc5423', [
            (r'\n-{50}\n(?s:.*)', ''),  # a rule, and the site's advertisement below it
        ]),
    'shuihu': (
        '水浒传', SHU + quote('水浒传.txt'), '7e2b9ae10a44ae6d56acddedb0980eddd01ba7b2b932dedc00b8fb53e10ea7fd', []),
    'xiyou': (
        '西游记', SHU + quote('西游记.txt'), '5a4002fa64722d63abccb133d2c1c806c5d63ded2fb2f62ddb338914df5fed1a', [
            (r'^[上中下]卷 (?=第)', ''),  # the volume, named before the heading of each chapter
        ]),
}
# drop the lines before chapter 1 (in 水浒传, before the prologue): title, author, and a table of contents, whose
# lines begin with 第001回
SHARED = [(r'\A((?!第一回|引首).*\n)+', '')]


@functools.cache  # the documents are read twice
def novel(name, path):
    """Download a novel to `path` if it is not there yet. Returns the path."""
    _, url, sha256, _ = NOVELS[name]
    fetch(path, f'{name}.txt', sha256, url, convert=lambda data: normalise(name, data))
    return path


def normalise(name, data):
    """Return the clean text of a novel from its raw file, both as bytes."""
    # strip() removes half- and full-width spaces and carriage returns; no blank lines, no newline after the last line
    lines = [line.strip() for line in data.decode('utf-8').split('\n')]
    text = '\n'.join(line for line in lines if line)
    for pattern, replacement in NOVELS[name][-1] + SHARED:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.encode()
