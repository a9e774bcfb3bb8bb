"""The readings of dataset/korean_numbers.py: beside num2words, and beside a table that was read by hand."""

from __future__ import annotations

import random

import pytest
from num2words import num2words

from dataset.korean_numbers import (
    HELD_OUT,
    NUMBERS,
    PHRASES,
    REQUEST,
    TRAINING,
    clock,
    date,
    decimal,
    fill,
    korean_number_chats,
    korean_number_phrases,
    korean_number_splits,
    native,
    sino,
    telephone,
)

# Read by hand, by the rules of 한글 맞춤법 and 표준어 규정; the code was not asked.
BY_HAND = [
    (sino, [
        (0, "영"), (1, "일"), (10, "십"), (11, "십일"), (16, "십육"), (20, "이십"), (26, "이십육"), (100, "백"),
        (101, "백일"), (110, "백십"), (111, "백십일"), (215, "이백십오"), (1000, "천"), (1004, "천사"),
        (1110, "천백십"), (2025, "이천이십오"), (9999, "구천구백구십구"), (10000, "만"), (10001, "만 일"),
        (12500, "만 이천오백"), (20000, "이만"), (110000, "십일만"), (334000, "삼십삼만 사천"), (1000000, "백만"),
        (1010000, "백일만"), (10000000, "천만"), (11110000, "천백십일만"), (100000000, "일억"),
        (100010000, "일억 일만"), (123456789, "일억 이천삼백사십오만 육천칠백팔십구"), (1000000000, "십억"),
        (1234560000, "십이억 삼천사백오십육만"), (10000000000, "백억"), (1000000000000, "일조"),
    ]),
    (native, [
        (1, "한"), (2, "두"), (3, "세"), (4, "네"), (5, "다섯"), (6, "여섯"), (7, "일곱"), (8, "여덟"), (9, "아홉"),
        (10, "열"), (11, "열한"), (12, "열두"), (14, "열네"), (19, "열아홉"), (20, "스무"), (21, "스물한"),
        (22, "스물두"), (26, "스물여섯"), (30, "서른"), (33, "서른세"), (40, "마흔"), (44, "마흔네"), (50, "쉰"),
        (60, "예순"), (70, "일흔"), (80, "여든"), (90, "아흔"), (99, "아흔아홉"), (100, "백"), (150, "백오십"),
    ]),
    (decimal, [
        ("3.5", "삼 점 오"), ("0.5", "영 점 오"), ("36.5", "삼십육 점 오"), ("12.05", "십이 점 영오"),
        ("3.14", "삼 점 일사"), ("7", "칠"), ("100.0", "백 점 영"),
    ]),
    (telephone, [
        ("010-1234-5678", "공일공 일이삼사 오육칠팔"), ("02-345-6789", "공이 삼사오 육칠팔구"),
        ("1588-0000", "일오팔팔 공공공공"),
    ]),
    (lambda parts: date(*parts), [
        ((2025, 6, 3), "이천이십오년 유월 삼일"), ((2024, 10, 31), "이천이십사년 시월 삼십일일"),
        ((1999, 12, 1), "천구백구십구년 십이월 일일"), ((2000, 1, 20), "이천년 일월 이십일"),
        ((0, 6, 6), "유월 육일"), ((0, 10, 10), "시월 십일"), ((0, 11, 11), "십일월 십일일"),
        ((2002, 0, 0), "이천이년"), ((2026, 2, 0), "이천이십육년 이월"), ((0, 3, 1), "삼월 일일"),
        ((0, 8, 15), "팔월 십오일"),
    ]),
    (lambda parts: clock(*parts), [
        ((3, 30), "세 시 삼십 분"), ((1, 0), "한 시"), ((2, 1), "두 시 일 분"), ((4, 44), "네 시 사십사 분"),
        ((5, 0), "다섯 시"), ((10, 10), "열 시 십 분"), ((11, 59), "열한 시 오십구 분"), ((12, 0), "열두 시"),
        ((0, 5), "영 시 오 분"), ((13, 0), "십삼 시"), ((14, 0), "십사 시"), ((20, 20), "이십 시 이십 분"),
        ((24, 0), "이십사 시"), ((6, 6), "여섯 시 육 분"), ((7, 25), "일곱 시 이십오 분"),
    ]),
]  # fmt: skip


def test_a_hundred_readings_by_hand():
    assert sum(len(table) for _, table in BY_HAND) == 100
    for read, table in BY_HAND:
        assert {number: read(number) for number, _ in table} == dict(table)


def test_sino_numbers_as_num2words_reads_them():
    """Ten thousand, of each length as many. It reads 1억 1만 as 일억 만, which is the one known difference."""
    draw = random.Random(0)
    wrong = []
    for _ in range(10000):
        number = draw.randrange(10 ** draw.randint(1, 12))
        if number // 10000 % 10000 == 1 and number >= 10**8:
            continue
        right = num2words(number, lang="ko")
        if sino(number).replace(" ", "") != right.replace(" ", ""):
            wrong.append((number, sino(number), right))
    assert not wrong


@pytest.mark.parametrize(
    "counter, right",
    [
        ("번째", "{0}번 {1} 번"), ("번", "{0}번 {2} 번"), ("분간", "{0}분 {1} 분"), ("분", "{0}분 {2} 분"),
        ("대째", "{0}대 {1} 대"), ("대", "{0}대 {2} 대"), ("권째", "{0}권 {1} 권"), ("권", "{0}권 {2} 권"),
        ("층", "{0}층 {1} 층"), ("살", "{0}살 {2} 살"), ("세", "{0}세 {1} 세"), ("달", "{0}달 {2} 달"),
        ("개월", "{0}개월 {1} 개월"), ("킬로미터", "{0}km {1} 킬로미터"),
    ],
)  # fmt: skip
def test_which_numerals_a_counter_has(counter, right):
    """Sino {1} or native {2}, in each of fifty draws."""
    draw = random.Random(0)
    for _ in range(50):
        written, read = NUMBERS[counter](draw)
        number = "".join(letter for letter in written if letter in "0123456789.")
        native_reading = "" if "." in number else native(int(number))
        assert f"{written} {read}" == right.format(number, decimal(number), native_reading)


# Of a telephone number's last digit.
PARTICLES = {
    "0": ["공으로", "공이에요", "공은"], "1": ["일로", "일이에요", "일은"], "2": ["이로", "이예요", "이는"],
    "3": ["삼으로", "삼이에요", "삼은"], "4": ["사로", "사예요", "사는"], "5": ["오로", "오예요", "오는"],
    "6": ["육으로", "육이에요", "육은"], "7": ["칠로", "칠이에요", "칠은"], "8": ["팔로", "팔이에요", "팔은"],
    "9": ["구로", "구예요", "구는"],
}  # fmt: skip


def test_particles_go_by_the_last_sound_that_is_read():
    draw = random.Random(0)
    for _ in range(200):
        for place, particle in enumerate(("으로", "이에요", "은")):
            written, read = fill("{전화}{" + particle + "}", draw)
            digit = next(letter for letter in reversed(written) if letter.isdigit())
            assert read.endswith(PARTICLES[digit][place]), (written, read)


def test_the_rows_are_the_same_each_time_and_the_held_out_sentences_are_new():
    splits = korean_number_splits()
    assert splits == korean_number_splits() and splits != korean_number_splits(seed=1)
    train, held_out = splits["train"], splits["validation"]
    assert len(train) == 3840 and len(held_out) == 256
    texts = [row["instruction"] for row in train + held_out]
    assert len(set(texts)) == len(texts)
    assert {row["kind"] for row in train} == {row["kind"] for row in held_out} == set(HELD_OUT)
    assert all(any(letter.isdigit() for letter in row["instruction"]) for row in train + held_out)
    assert not any(letter.isdigit() for row in train + held_out for letter in row["output"])
    trained = {sentence for sentences in (TRAINING, PHRASES) for group in sentences.values() for sentence in group}
    assert not trained & {sentence for group in HELD_OUT.values() for sentence in group}


def test_the_demo_has_short_rows_and_other_ones_held_out():
    splits = korean_number_phrases()
    assert splits == korean_number_phrases()
    train, held_out = ({row["instruction"] for row in splits[name]} for name in ("train", "validation"))
    assert (len(splits["train"]), len(held_out)) == (800, 64) and not train & held_out
    for rows in splits.values():
        assert {row["kind"] for row in rows} == {"date", "floors", "percent", "minutes", "months"}
    assert max(map(len, train)) < 16


def test_conversations_are_made_of_the_same_rows():
    splits, chats = korean_number_phrases(), korean_number_chats()
    for name, turns in (("train", 4), ("validation", 1)):
        assert {len(row["messages"]) for row in chats[name]} == {2 * turns}
        messages = [message for row in chats[name] for message in row["messages"]]
        questions = [message["content"].replace(f"{REQUEST} ", "") for message in messages if message["role"] == "user"]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert questions == [row["instruction"] for row in splits[name]]
        assert answers == [row["output"] for row in splits[name]]
        firsts = [row["messages"][0]["content"] for row in chats[name]]
        assert all(first.startswith(f"{REQUEST} ") for first in firsts)
