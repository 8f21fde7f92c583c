"""
The four classic novels: where they come from, and how the raw files become clean texts.

The raw files come from two collections on GitHub, each at a fixed commit. All four are UTF-8, but no two are set alike: indents, blank lines,
titles, a contents list, a site's advertisement. The clean texts are the novels alone, a paragraph or a line of verse on each line. Slips of
the sources stay as they are, above all a '?' where a character was lost: 39 in 红楼梦, 512 in 水浒传, 11 in 三国演义.
"""
import functools
import re
from urllib.parse import quote

from core.text.download import fetch

SHU = 'https://raw.githubusercontent.com/shjwudp/shu/61aa02363241bcf32574708f1ff06ed698fb646b/books/'
W2V = 'https://raw.githubusercontent.com/Seungberry/W2V/2208ad5e2963f3b844d97761cb310f127d93ec3d/'  # 三国演义 is cut short in SHU

NOVELS = {  # name: (title, url, sha256 of the clean text, [(pattern, replacement)]: what is particular to its raw file, in this order)
    'hongloumeng': ('红楼梦', SHU + quote('红楼梦.txt'), 'bc22d94efccb7ebfc242342e9ec5db10fa308045439056e959d7ef1ffb9744af', [
        (r'[ \u3000]', ''),  # inside lines too: they set off the parts of headings and the poets' names, some half and some full width
        (r'\n〔', '〔'),  # the songs of chapter 5 (14 lines) go on in the line above, which makes it the 875,372 characters of the reference article
    ]),
    'sanguo': ('三国演义', W2V + 'sanguoyanyi.txt', 'fa5dbfef677b6dae5afe9abf87208aa62b7eac77d55b142b959630e82bbc5423', [
        (r'\n-{50}\n(?s:.*)', ''),  # a rule and, below it to the end, the site's advertisement
    ]),
    'shuihu': ('水浒传', SHU + quote('水浒传.txt'), '7e2b9ae10a44ae6d56acddedb0980eddd01ba7b2b932dedc00b8fb53e10ea7fd', []),
    'xiyou': ('西游记', SHU + quote('西游记.txt'), '5a4002fa64722d63abccb133d2c1c806c5d63ded2fb2f62ddb338914df5fed1a', [
        (r'^[上中下]卷 (?=第)', ''),  # the volume, named before the heading of each chapter
    ]),
}
# drop the lines before chapter 1 (or, in 水浒传, before its prologue): title, author, a contents list, whose lines begin with 第001回 instead
SHARED = [(r'\A((?!第一回|引首).*\n)+', '')]


@functools.cache  # the documents are read twice
def novel(name, path):
    """Fetch a novel to `path`, unless it is there already. Returns the path."""
    _, url, sha256, _ = NOVELS[name]
    fetch(path, f'{name}.txt', sha256, url, convert=lambda data: normalise(name, data))
    return path


def normalise(name, data):
    """The clean text of a novel from its raw file, both as bytes."""
    # strip() takes half- and full-width spaces and the carriage return; blank lines go, and so does the newline after the last line
    text = '\n'.join(filter(None, map(str.strip, data.decode('utf-8').split('\n'))))
    for pattern, replacement in NOVELS[name][-1] + SHARED:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.encode()
