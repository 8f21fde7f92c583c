"""The four novels: the clean texts to the byte where the raw files are at hand, and each rule on a few lines."""
import hashlib
import re
import sys

import pytest
from conftest import MIRROR, ROOT

sys.path.insert(0, str(ROOT / 'data' / 'classics_bbpe'))
import classics  # noqa: E402
from classics import NOVELS, normalise  # noqa: E402

NUMBERS = {  # characters, vocabulary, first and last heading
    'hongloumeng': (
        875_372,
        4_432,
        '第一回甄士隐梦幻识通灵贾雨村风尘怀闺秀',
        '第一百二十回甄士隐详说太虚情贾雨村归结红楼梦',
    ),
    'sanguo': (
        597_166,
        3_950,
        '第一回　宴桃园豪杰三结义　斩黄巾英雄首立功',
        '第一百二十回　荐杜预老将献新谋　降孙皓三分归一统',
    ),
    'shuihu': (861_729, 4_211, '引首', '第一百二十回 宋公明神聚蓼儿洼 徽宗帝梦游梁山泊'),
    'xiyou': (718_751, 4_497, '第一回　灵根育孕源流出　心性修持大道生', '第一百回　径回东土　五圣成真'),
}
RAW = {
    'hongloumeng': 'shu_hongloumeng.txt',
    'sanguo': 'seungberry_sanguo.txt',
    'shuihu': 'shu_shuihu.txt',
    'xiyou': 'shu_xiyou.txt',
}


def file(*names):
    path = MIRROR.joinpath(*names)
    if not path.exists():
        pytest.skip(f'no file {path}')
    return path.read_bytes()


@pytest.mark.parametrize('name', NOVELS)
def test_raw_file_becomes_clean_text(name):
    data = normalise(name, file('raw', RAW[name]))
    assert hashlib.sha256(data).hexdigest() == NOVELS[name][2]


@pytest.mark.parametrize('name', NOVELS)
def test_numbers_of_clean_text(name):
    data = file(f'{name}.txt')
    assert hashlib.sha256(data).hexdigest() == NOVELS[name][2]
    text = data.decode('utf-8')
    characters, vocabulary, first, last = NUMBERS[name]
    assert (len(text), len(set(text))) == (characters, vocabulary)
    lines = text.split('\n')
    assert lines[0] == first and last in lines
    assert all(line and line == line.strip() for line in lines)
    assert (
        text.count('?') == {'hongloumeng': 39, 'shuihu': 512, 'sanguo': 11, 'xiyou': 0}[name]
    )  # characters that the sources lost


def test_table():
    assert list(NOVELS) == list(NUMBERS)
    for _, url, sha256, _ in NOVELS.values():
        assert re.fullmatch(r'https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/[\w./%-]+', url, re.ASCII)
        assert re.fullmatch(r'[0-9a-f]{64}', sha256)


@pytest.mark.parametrize('name, raw, clean', [
    # shared rules: spaces at the ends of lines, blank lines and carriage returns are removed, spaces inside lines
    # are kept; lines that look like a title are removed only before the first chapter
    ('shuihu', '\u3000\u3000引首 \r\n\r\n \u3000\n    词曰：  甲 乙\u3000丙\u3000\n\n', '引首\n词曰：  甲 乙\u3000丙'),
    ('shuihu', '《水浒传》\n\n 引首\n《水浒传》\n  第一回 甲\n', '引首\n《水浒传》\n第一回 甲'),
    ('sanguo', '[ 本书籍 ]\r\n\r\n作者\r\n第001回\u3000甲\r\n第002回\u3000乙\r\n\r\n'
     '第一回\u3000甲\r\n\u3000\u3000滚滚\r\n第二回\u3000乙\r\n第一回\u3000完\r\n',
     '第一回\u3000甲\n滚滚\n第二回\u3000乙\n第一回\u3000完'),
    ('hongloumeng', '《红楼梦》\n\n曹雪芹 \u3000高鄂  著\n\n\n第一回  甲\u3000乙\n曹雪芹', '第一回甲乙\n曹雪芹'),
    # rules of one novel
    ('hongloumeng', '第一回\n\n〔终身误〕都道\n\n\u3000〔枉凝眉〕一个\n\n宝玉听了〔此曲〕\n',
     '第一回〔终身误〕都道〔枉凝眉〕一个\n宝玉听了〔此曲〕'),
    ('sanguo', '第一回\n---\n牢骚。\n\n\n' + '-' * 50 + '\n【本书籍\n】\n', '第一回\n---\n牢骚。'),
    ('xiyou', '\u3000\u3000[西游记 / 吴承恩（明） 著 ]\n\n\u3000\u3000上卷 第一回\u3000灵根\n诗曰\n'
     '\u3000中卷 第三十四回\u3000魔王\n下卷 书\n看上卷 第一回',
     '第一回\u3000灵根\n诗曰\n第三十四回\u3000魔王\n下卷 书\n看上卷 第一回'),
])
def test_rules(name, raw, clean):
    assert normalise(name, raw.encode()).decode() == clean


@pytest.mark.parametrize('name', NOVELS)
def test_clean_text_stays(name):
    text = file(f'{name}.txt')
    assert normalise(name, text) == text


def test_not_utf8():
    """A ValueError, which fetch takes for a source that does not serve."""
    with pytest.raises(ValueError):
        normalise('shuihu', '引首'.encode('gb18030'))


def test_novel(tmp_path, monkeypatch):
    """What is asked of fetch."""
    asked = {}
    monkeypatch.setattr(classics, 'fetch', lambda path, name, sha256, url, convert: asked.update(
        path=path, name=name, sha256=sha256, url=url, clean=convert('《水浒传》\n\n 引首\n'.encode())))
    path = str(tmp_path / 'shuihu.txt')
    assert classics.novel('shuihu', path) == path
    _, url, sha256, _ = NOVELS['shuihu']
    assert asked == {'path': path, 'name': 'shuihu.txt', 'sha256': sha256, 'url': url, 'clean': '引首'.encode()}
