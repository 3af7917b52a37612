"""A real data set comes out of every script; where none does, the reason is said."""

from __future__ import annotations

import json

import pytest
from json_keys import assert_documented
from longqa_material import rows

from longlora_plugin.longqa.scripts import join_lines, sentences

for package in ("sentencex", "datasketch"):
    pytest.importorskip(package)

# {n} is a number, {a} and {b} are names and {t} is a thing, so that every sentence is its own.
TOLD = {
    "Chinese": (
        (
            "在第{n}年，{a}修好了村里的旧{t}。",
            "{b}问道：“谁看见了那{n}把{t}？”",
            "谁也不知道{a}走了{n}里路！",
        ),
        ("李明", "王芳", "张伟", "陈静"),
        ("灯笼", "木桥", "账本", "果园"),
    ),
    "Japanese": (
        (
            "{n}年に、{a}は村の古い{t}を直した。",
            "{b}は「{t}が{n}個ある」と言った。",
            "{a}は{n}歩も歩いたのか？",
        ),
        ("太郎", "花子", "健一", "美咲"),
        ("提灯", "木の橋", "帳簿", "果樹園"),
    ),
    "Korean": (
        (
            "{n}년에 {a}은 마을의 낡은 {t}를 고쳤습니다.",
            "{b}은 {t} 앞에서 {n}번 울었습니다!",
            "누가 {n}개의 {t}를 보았을까요?",
        ),
        ("민수", "영희", "철수", "지은"),
        ("등불", "다리", "장부", "과수원"),
    ),
    "Thai": (
        (
            "ในปีที่ {n} {a}ได้ซ่อม{t}เก่าของหมู่บ้านจนเสร็จเรียบร้อย",
            "{b}บอกทุกคนว่ามี{t}อยู่ทั้งหมด {n} ชิ้นในบ้านหลังนั้น",
        ),
        ("สมชาย", "มาลี", "วิชัย", "สุดา"),
        ("โคมไฟ", "สะพานไม้", "สมุดบัญชี", "สวนผลไม้"),
    ),
    "Arabic": (
        (
            "في عام {n} أصلح {a} {t} القديم في القرية.",
            "هل رأى {b} ذلك {t} بعد {n} يوما؟",
            "سار {a} {n} خطوة حتى وصل إلى {t}!",
        ),
        ("سليم", "مريم", "يوسف", "ليلى"),
        ("المصباح", "الجسر", "الدفتر", "البستان"),
    ),
    "Hindi": (
        (
            "सन {n} में {a} ने गाँव का पुराना {t} ठीक किया।",
            "क्या {b} ने {n} दिन बाद वह {t} देखा?",
            "{a} {t} तक {n} कदम चला।",
        ),
        ("मोहन", "सीता", "राजेश", "गीता"),
        ("दीपक", "पुल", "खाता", "बगीचा"),
    ),
    "Russian": (
        (
            "В {n} году старый {a} починил {t} в деревне.",
            "Никто, кроме {b}, не знал про {t} и {n} монет.",
        ),
        ("Тимофей", "Матвей", "Арсений", "Николай"),
        ("фонарь", "мост", "журнал", "сарай"),
    ),
}
ENDS = "。！？」.!?؟।"


def text_in(language: str) -> str:
    patterns, names, things = TOLD[language]
    gap = "" if language in ("Chinese", "Japanese") else " "
    told = [
        patterns[n % len(patterns)].format(
            n=1000 + 7 * n, a=names[n % 4], b=names[(n + 1) % 4], t=things[(n // 3) % 4]
        )
        for n in range(160)
    ]
    return "\n\n".join(gap.join(told[at : at + 5]) for at in range(0, len(told), 5))


@pytest.mark.parametrize("language", TOLD)
def test_a_text_in_any_language_gives_a_data_set(build, tmp_path, language):
    (tmp_path / "a.txt").write_text(text_in(language), encoding="utf-8")
    out, report = tmp_path / "a.jsonl", tmp_path / "r.json"
    result = build(tmp_path / "a.txt", out, "--json", report, context=3000)
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert {"what_follows", "find_needle", "order_of_events"} <= set(found["tasks"])
    assert_documented("longqa build", found)
    assert found["pairs"]["train"] == len(rows(out)) >= 3 * found["windows"]
    assert found["left_out"] == 0
    for row in rows(out):
        answer = row["output"]
        if len(answer) > 20:
            assert row["instruction"].count(answer) >= 1
            assert language == "Thai" or answer[-1] in ENDS + "”"


@pytest.mark.parametrize("language", TOLD)
def test_one_long_paragraph_is_cut_between_sentences_and_loses_nothing(build, tmp_path, language):
    joined = "" if language in ("Chinese", "Japanese") else " "
    text = joined.join(text_in(language).split("\n\n"))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    out, report = tmp_path / "a.jsonl", tmp_path / "r.json"
    assert build(tmp_path / "a.txt", out, "--json", report, context=2000).exit_code == 0
    found = json.loads(report.read_text())
    assert found["windows"] > 2
    assert found["left_out"] == 0
    assert any(part in row["instruction"] for row in rows(out) for part in (text[:40],))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("他来了。她走了！谁在说话？“没有人。”大家笑了。", 5),
        ("一つ。二つ！「三つ？」", 3),
        ("वह आया। वह गया॥ कौन?", 3),
        ("هل جاء؟ نعم. ذهب!", 3),
        ("誰が来たのか？1021年に村へ。3人だ！", 3),
        ("वह आया।12 लोग गए। हाँ।", 3),
        ("他说：“谁来了？12个人。”3天后他走了。", 2),
        ("円周率は3.14だ。Version 2.0 is out.", 2),
    ],
)
def test_marks_of_other_scripts_end_a_sentence(text, count):
    found = sentences(text)
    assert len(found) == count
    assert "".join(found).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("language", TOLD)
def test_every_sentence_of_a_text_is_one(language):
    assert len(sentences(text_in(language))) == 160


def test_hard_wrapped_lines_are_joined_by_a_space_only_where_the_script_has_spaces():
    assert join_lines(["他来到了", "村里。", "天黑了"]) == "他来到了村里。天黑了"
    assert join_lines(["one", "two"]) == "one two"
    assert join_lines(["마을에", "노인이"]) == "마을에 노인이"


def test_sentences_of_hostile_text_take_no_time_that_grows_with_its_square():
    import time

    start = time.monotonic()
    assert len(sentences("`" * 530_000)) == 1
    assert len(sentences("字。" * 100_000)) == 100_000
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("短。小。大。多。少。", (), "none of its 5 sentences can be asked about"),
        (text_in("Chinese"), ("--task", "fill_name"), "fill_name: none finds anything in its"),
        ("1 2 3 | 4 5 6\n\n7 8 9 | 0 1 2", (), "none of its"),
    ],
)
def test_a_document_that_gives_nothing_says_why(build, tmp_path, text, options, says):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    result = build(tmp_path / "a.txt", tmp_path / "out.jsonl", *options)
    assert result.exit_code == 1
    assert f"no pairs from a.txt: {says}" in " ".join(result.output.split())
