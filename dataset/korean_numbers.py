"""Korean sentences with numbers, and the same sentences as they are read aloud: rows made on the spot from a seed.

    instruction  "사과 3개에 4,500원입니다."
    output       "사과 세 개에 사천오백 원입니다."
    kind         "several"

A program that speaks (TTS) needs such readings, and so does a text that goes with recorded speech (ASR). A table of
rules alone is not enough, because the same counter is read in two ways: "3번 출구" is 삼 번, "3번 보았다" is 세 번.

The rules, of 한글 맞춤법 (https://korean.go.kr/kornorms):
- Sino-Korean numerals (일, 이, 삼) by groups of 만, with a space between the groups (§44): 만 이천오백, 십이억 삼천만.
- Native numerals (하나, 둘, 셋) before most counters, in their short form: 한 개, 두 명, 스무 살, 스물한 살.
- A counter stands apart from its number (§43): 삼 층, 삼 점 오 퍼센트. A date is together: 이천이십오년 유월 삼일.
- Hours are native up to 12, minutes are sino: 세 시 삼십 분. 0 and 13 to 24 are sino: 십사 시.
- A telephone number is read digit by digit with 공, its groups apart; decimals digit by digit with 영, behind 점.
"""

from __future__ import annotations

import calendar
import random
from string import Formatter
from typing import Callable, Dict, List, Tuple

DIGITS = "영일이삼사오육칠팔구"
GROUPS = ["", "만", "억", "조"]
NATIVE_ONES = ["", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉"]
NATIVE_TENS = ["", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔"]
MONTHS = ["", "일월", "이월", "삼월", "사월", "오월", "유월", "칠월", "팔월", "구월", "시월", "십일월", "십이월"]

TRAINING_ROWS = 3840
HELD_OUT_ROWS = 256
DEMO_ROWS = 800
DEMO_HELD_OUT_ROWS = 64
# Of the rows, in percent: what is hard to learn is there more often.
SHARES = {"money": 18, "counters": 40, "context": 20, "time": 7, "date": 5, "telephone": 5, "several": 5}


# ------------------------------------------------------------------------------------------------ readings


def sino(number: int) -> str:
    """The Sino-Korean reading of a whole number from 0: 12500 -> "만 이천오백".

    No 일 stands before 천, 백 and 십, nor before 만 where it comes first; but 일억, 일조. ValueError from 10 ** 16 on.
    """
    if number >= 10**16:
        raise ValueError(f"{number} is too large: only numbers below 10 ** 16 are read")
    if number == 0:
        return DIGITS[0]
    parts = []
    for power, group in enumerate(GROUPS):
        value = number // 10 ** (4 * power) % 10**4
        if value == 0:
            continue
        is_first = number < 10 ** (4 * power + 4)
        digits = "" if value == 1 and group == "만" and is_first else _below_ten_thousand(value)
        parts.insert(0, digits + group)
    return " ".join(parts)


def _below_ten_thousand(number: int) -> str:
    text = ""
    for unit, name in ((1000, "천"), (100, "백"), (10, "십"), (1, "")):
        digit = number // unit % 10
        if digit == 1 and name:
            text += name
        elif digit:
            text += DIGITS[digit] + name
    return text


def native(number: int) -> str:
    """The native reading before a counter: 1 -> "한", 20 -> "스무", 21 -> "스물한". From 100 on it is the sino one."""
    if number >= 100:
        return sino(number)
    if number == 20:
        return "스무"
    return NATIVE_TENS[number // 10] + NATIVE_ONES[number % 10]


def decimal(number: str) -> str:
    """The reading of a decimal number: "3.05" -> "삼 점 영오"; of a whole one as `sino`."""
    whole, _, digits = number.partition(".")
    reading = sino(int(whole))
    return f"{reading} 점 {digit_by_digit(digits)}" if digits else reading


def digit_by_digit(digits: str, zero: str = "영") -> str:
    """Each digit by its name: "05" -> "영오"."""
    return "".join(DIGITS[int(digit)] for digit in digits).replace(DIGITS[0], zero)


def telephone(number: str) -> str:
    """ "010-1234-5678" -> "공일공 일이삼사 오육칠팔"."""
    return " ".join(digit_by_digit(group, zero="공") for group in number.split("-"))


def date(year: int, month: int, day: int) -> str:
    """(2025, 6, 3) -> "이천이십오년 유월 삼일"; what is 0 is left out."""
    parts = [f"{sino(year)}년" if year else "", MONTHS[month], f"{sino(day)}일" if day else ""]
    return " ".join(part for part in parts if part)


def clock(hour: int, minute: int) -> str:
    """(3, 30) -> "세 시 삼십 분", (14, 0) -> "십사 시"."""
    hours = native(hour) if 1 <= hour <= 12 else sino(hour)
    return f"{hours} 시 {sino(minute)} 분" if minute else f"{hours} 시"


# ------------------------------------------------------------------------------------------------ numbers in a sentence


def _won(draw: random.Random) -> Tuple[str, str]:
    """An amount of money of three to seven digits, three of them at most before its zeros, as prices are."""
    digits = draw.randint(3, 7)
    zeros = draw.randint(max(1, digits - 3), digits - 1)
    amount = draw.randrange(10 ** (digits - zeros - 1), 10 ** (digits - zeros)) * 10**zeros
    without_comma = digits == 4 and draw.random() < 0.3
    return f"{amount}원" if without_comma else f"{amount:,}원", f"{sino(amount)} 원"


def _date(with_year: float) -> Callable:
    """with_year: the share of dates that have one."""

    def make(draw: random.Random) -> Tuple[str, str]:
        year, month = draw.randint(1950, 2040), draw.randint(1, 12)
        day = draw.randint(1, calendar.monthrange(year, month)[1])
        if draw.random() < with_year:
            return f"{year}년 {month}월 {day}일", date(year, month, day)
        return f"{month}월 {day}일", date(0, month, day)

    return make


def _time(draw: random.Random) -> Tuple[str, str]:
    hour = draw.randint(1, 12) if draw.random() < 0.75 else draw.choice([0, *range(13, 25)])
    minute = draw.choice([0, draw.randint(1, 59), draw.randrange(5, 60, 5)])
    before = draw.choice(["", "오전 ", "오후 "]) if 1 <= hour <= 12 else ""
    written = f"{hour}시 {minute}분" if minute else f"{hour}시"
    return before + written, before + clock(hour, minute)


def _telephone(draw: random.Random) -> Tuple[str, str]:
    first = draw.choice(["010", "010", "02", "031", "051", "064", "070"])
    middle = draw.randrange(1000, 10000) if first in ("010", "070") else draw.randrange(200, 1000)
    written = f"{first}-{middle}-{draw.randrange(10000):04}"
    return written, telephone(written)


def _number(draw: random.Random, least: int, most: int) -> int:
    """Small numbers are the usual ones."""
    if least == 1 and draw.random() < 0.3:
        most = min(10, most)
    return draw.randint(least, most)


def _native(counter: str, most: int) -> Callable:
    def make(draw: random.Random) -> Tuple[str, str]:
        number = _number(draw, 1, most)
        return f"{number}{counter}", f"{native(number)} {counter}"

    return make


def _sino(counter: str, least: int, most: int, reading: str = "", decimals: bool = False) -> Callable:
    def make(draw: random.Random) -> Tuple[str, str]:
        number = _number(draw, least, most)
        written = str(number)
        if decimals and number < most and draw.random() < 0.5:
            written += f".{draw.randint(1, 9)}"
        return f"{written}{counter}", f"{decimal(written)} {reading or counter}"

    return make


def _decade(draw: random.Random) -> Tuple[str, str]:
    number = draw.randrange(10, 100, 10)
    return f"{number}대", f"{sino(number)} 대"


def _hours(draw: random.Random) -> Tuple[str, str]:
    """Native up to 20, sino above: 세 시간, 이십사 시간."""
    number = draw.randint(1, 20) if draw.random() < 0.8 else draw.choice([24, 36, 48, 72])
    return f"{number}시간", f"{native(number) if number <= 20 else sino(number)} 시간"


# What a name in braces in a sentence is: a function of random numbers that returns (as it is written, as it is read).
NUMBERS: Dict[str, Callable] = {
    "원": _won, "날짜": _date(0.5), "월일": _date(0), "시각": _time, "몇퍼센트": _sino("%", 1, 100, "퍼센트"),
    "전화": _telephone, "시간": _hours,
    # native
    "개": _native("개", 99), "명": _native("명", 99), "마리": _native("마리", 50), "권": _native("권", 50),
    "대": _native("대", 60), "잔": _native("잔", 20), "병": _native("병", 40), "살": _native("살", 99),
    "송이": _native("송이", 99), "켤레": _native("켤레", 30), "달": _native("달", 12), "해": _native("해", 20),
    "장": _native("장", 99), "번": _native("번", 30), "분": _native("분", 40),
    # sino
    "층": _sino("층", 1, 60), "분간": _sino("분", 1, 59), "초": _sino("초", 1, 59), "세": _sino("세", 1, 99),
    "년": _sino("년", 1, 60), "인분": _sino("인분", 1, 20), "개월": _sino("개월", 1, 36),
    "호": _sino("호", 101, 2030), "킬로미터": _sino("km", 1, 450, "킬로미터", decimals=True),
    "킬로그램": _sino("kg", 1, 120, "킬로그램", decimals=True), "도": _sino("도", 1, 40, decimals=True),
    "퍼센트": _sino("%", 1, 100, "퍼센트", decimals=True),
    # sino, of a counter that is native in other places
    "번째": _sino("번", 1, 40), "노선": _sino("번", 1, 999), "대째": _sino("대", 1, 30), "권째": _sino("권", 1, 30),
    "장째": _sino("장", 1, 20), "년대": _decade,
}  # fmt: skip


def _batchim(text: str) -> int:
    """The number of the last letter's final consonant, 0 for none; 8 is ㄹ."""
    return (ord(text[-1]) - ord("가")) % 28


# Particles that go by the last sound of what is read: 팔로, 삼으로; 팔이에요, 사예요.
PARTICLES: Dict[str, Callable] = {
    "으로": lambda read: "로" if _batchim(read) in (0, 8) else "으로",
    "이에요": lambda read: "이에요" if _batchim(read) else "예요",
    "은": lambda read: "은" if _batchim(read) else "는",
}


def fill(sentence: str, draw: random.Random) -> Tuple[str, str]:
    """Numbers for the names in braces of a sentence: the sentence as it is written, and as it is read."""
    written = ""
    read = ""
    for text, name, _, _ in Formatter().parse(sentence):
        written += text
        read += text
        if name in PARTICLES:
            particle = PARTICLES[name](read)
            written += particle
            read += particle
        elif name:
            number, reading = NUMBERS[name](draw)
            written += number
            read += reading
    return written, read


# ------------------------------------------------------------------------------------------------ sentences

TRAINING: Dict[str, List[str]] = {
    "money": [
        "이 가방은 {원}입니다.", "점심값으로 {원}을 냈어요.", "한 달 월세가 {원}이에요.", "지갑에 {원}밖에 없다.",
        "지난달 전기 요금이 {원} 나왔습니다.", "배송비 {원}은 따로 내셔야 합니다.", "택시비가 {원}이나 들었어요.",
        "할머니께서 용돈으로 {원}을 주셨어요.", "통장에 {원}이 남아 있어요.", "그 시계는 {원}에 팔렸습니다.",
        "표 값은 어른 {원}입니다.", "모두 합해서 {원}이네요.", "친구에게 {원}을 빌렸다.", "하루에 {원}씩 모았어요.",
    ],
    "date": [
        "회의는 {날짜}에 열립니다.", "저는 {날짜}에 태어났어요.", "신청은 {날짜}까지 받습니다.",
        "{날짜}부터 새 학기가 시작돼요.", "우리 가게는 {날짜}에 문을 열었습니다.", "이 우유는 {날짜}까지 드세요.",
        "공연은 {날짜}로 미뤄졌다.", "생일은 {날짜}이에요.",
    ],
    "time": [
        "기차는 {시각}에 떠납니다.", "내일 {시각}까지 와 주세요.", "{시각}에 알람을 맞춰 주세요.",
        "영화가 {시각}에 시작해요.", "병원 예약은 {시각}입니다.", "어제는 {시각}에 잠들었어요.",
        "가게는 {시각}부터 열어요.", "지금은 {시각}입니다.", "비행기가 {시각}에 내렸습니다.",
    ],
    "telephone": [
        "예약은 {전화}{으로} 해 주세요.", "제 전화번호는 {전화}입니다.", "궁금한 점은 {전화}{으로} 물어보세요.",
        "연락처는 {전화}{이에요}.", "{전화}{은} 없는 번호입니다.", "{전화}{으로} 문자를 보내 주세요.",
    ],
    "counters": [
        "냉장고에 달걀이 {개} 있어요.", "의자 {개}를 옮겼다.", "가방에 연필이 {개} 들어 있습니다.",
        "교실에 학생이 {명} 남아 있습니다.", "친구 {명}을 불렀어요.", "이번 반은 모두 {명}이다.",
        "우리 집에는 고양이가 {마리} 살아요.", "소 {마리}를 키웁니다.", "새 {마리}가 날아갔다.",
        "아침마다 물을 {잔} 마셔요.", "커피 {잔}을 시켰다.", "음료수 {병}을 주문했습니다.", "우유가 {병} 남았어요.",
        "제 동생은 올해 {살}이 되었어요.", "저는 {살}입니다.", "{살} 때부터 피아노를 배웠다.", "{살}에 상을 받았어요.",
        "장미 {송이}를 선물했어요.", "포도 {송이}가 달렸다.", "양말 {켤레}를 샀어요.", "신발이 {켤레} 있습니다.",
        "공사는 {달} 동안 이어졌습니다.", "{달} 뒤에 돌아올게요.", "그 나무는 {해} 만에 열매를 맺었어요.",
        "{해} 동안 기다렸다.", "서울에서 부산까지 {시간} 걸렸습니다.", "밤새 {시간} 동안 눈이 내렸어요.",
        "하루에 {시간}씩 잡니다.", "사무실은 {층}에 있습니다.", "이 건물은 {층}까지 있어요.",
        "식당은 {층}으로 올라가세요.", "출발까지 {초} 남았습니다.", "신호가 {초} 만에 바뀌었다.",
        "참가하려면 {세} 이상이어야 합니다.", "환자는 {세} 여성입니다.", "이 회사에서 {년} 동안 일했어요.",
        "{년} 전에 지은 집이다.", "삼겹살 {인분} 주세요.", "불고기 {인분}을 시켰어요.", "보증 기간은 {개월}입니다.",
        "아기가 {개월} 됐어요.", "공항까지는 {킬로미터}쯤 됩니다.", "매일 {킬로미터}를 달렸다.",
        "짐이 {킬로그램}을 넘으면 안 됩니다.", "쌀 {킬로그램}을 샀어요.", "오늘 낮 기온은 {도}까지 오르겠습니다.",
        "방 온도를 {도}로 맞췄다.", "목욕물은 {도}가 좋아요.", "국이 {도}로 식었다.", "관객 {명}이 모였습니다.",
        "선수 {명}이 경기에 나섰다.", "상자 {개}를 날랐어요.", "우리 할머니는 {살}이세요.", "강아지가 {마리} 태어났다.",
        "지금 밖은 {도}예요.", "손님 방은 {호}입니다.", "{호}에 사는 이웃을 만났어요.",
        "올해 매출이 {퍼센트} 늘었습니다.", "할인율은 {퍼센트}예요.", "찬성이 {퍼센트}였다.",
    ],
    "context": [
        "{번째} 출구로 나오세요.", "{번째} 문제를 풀어 보세요.", "{번째} 선수가 넘어졌다.", "{노선} 버스를 타세요.",
        "같은 노래를 {번} 들었어요.", "하루에 {번} 약을 드세요.", "그 영화를 {번} 보았다.", "전화를 {번} 걸었습니다.",
        "걸어서 {분간} 걸립니다.", "라면은 {분간} 동안 끓이세요.", "{분간} 뒤에 시작해요.", "수업이 {분간} 늦어졌다.",
        "손님 {분}이 오셨습니다.", "선생님 {분}께 인사를 드렸어요.", "어른 {분}을 초대했다.", "그는 {대째} 대통령이다.",
        "{대째} 회장으로 뽑혔습니다.", "자동차 {대}가 지나갔다.", "주차장에 트럭이 {대} 서 있습니다.",
        "버스 {대}를 빌렸어요.", "{년대} 여성 고객이 많아요.", "손님은 대부분 {년대} 남성입니다.",
        "{권째}부터 읽으세요.", "{권째}에 나오는 이야기다.", "책 {권}을 샀다.", "도서관에서 소설을 {권} 빌렸어요.",
        "교과서 {장째}을 펴세요.", "{장째}까지 읽었다.", "종이 {장}을 나눠 주세요.", "사진을 {장} 찍었어요.",
    ],
    "several": [
        "{시각}부터 {분간} 동안 회의를 합니다.", "사과 {개}에 {원}입니다.", "{날짜} {시각}에 만나요.",
        "어른 {명}과 아이 {명}이 갑니다.", "{층} {호}로 오세요.", "맥주 {병}을 시키고 {원}을 냈어요.",
    ],
}  # fmt: skip

# Parts of sentences for the training: short rows teach a number at less cost.
PHRASES: Dict[str, List[str]] = {
    "money": ["{원}", "모두 {원}", "{원}을 냈다"],
    "date": ["{날짜}"], "time": ["{시각}", "{시각}에"], "telephone": ["{전화}"],
    "counters": [
        "{개}", "{명}", "{마리}", "{송이}", "물 온도 {도}", "사과 {개}", "상자 {개}를", "사람 {명}", "학생 {명}이",
        "고양이 {마리}", "커피 {잔}", "물 {병}", "{살}", "{살} 때", "꽃 {송이}", "신발 {켤레}", "{달} 동안",
        "{해} 동안", "{시간}", "{층}", "{층}으로", "{초}", "{세}", "{년} 동안", "{인분}", "{개월}", "{킬로미터}",
        "{킬로그램}", "{도}", "{도}까지", "{호}", "{퍼센트}",
    ],
    "context": [
        "{번째} 출구", "{번째} 문제", "{노선} 버스", "{번} 보았다", "{분간} 걸린다", "{분간} 뒤에", "{분}이 오셨다",
        "{대째} 대통령", "자동차 {대}", "{년대} 여성", "{권째}부터", "책 {권}", "{장째}을 펴다", "종이 {장}",
    ],
}  # fmt: skip

# Whole sentences that no row of the training has.
HELD_OUT: Dict[str, List[str]] = {
    "money": ["자전거를 {원}에 팔았어요.", "이번 달 카드값은 {원}입니다.", "입장료는 한 사람에 {원}이에요."],
    "date": ["결혼식은 {날짜}에 있어요.", "계약은 {날짜}에 끝납니다."],
    "time": ["버스가 {시각}에 도착합니다.", "우리는 {시각}에 출발해요."],
    "telephone": ["급한 일은 {전화}{으로} 알려 주세요.", "사무실 번호는 {전화}입니다."],
    "counters": [
        "창고에 상자가 {개} 쌓여 있다.", "마당에서 강아지 {마리}가 놀고 있어요.", "회의에 직원 {명}이 참석했습니다.",
        "할머니는 {살} 때 서울에 오셨어요.", "물이 {도}까지 데워졌어요.", "매장은 {층}으로 옮겼어요.",
        "설문에 답한 사람은 {퍼센트}였습니다.",
    ],
    "context": [
        "{번째} 출구에서 만나요.", "그 책을 {번} 읽었어요.", "도착하려면 {분간} 더 걸려요.",
        "어르신 {분}을 모셨습니다.", "전시장에 자동차 {대}를 세웠다.", "{년대} 남성이 많이 삽니다.",
    ],
    "several": ["{날짜} {시각}에 예약했어요.", "연필 {개}와 공책 {권}을 샀어요."],
}  # fmt: skip


# What `make demo`, and a LoRA adapter of the small model, learn within minutes: sino numerals alone.
DEMO: Dict[str, str] = {
    "date": "{월일}", "floors": "{층}", "percent": "{몇퍼센트}", "minutes": "{분간}", "months": "{개월}",
}  # fmt: skip

REQUEST = "이 문장을 소리 내어 읽는 대로 써 줘."  # the first words of a conversation


def korean_number_splits(seed: int = 0) -> Dict[str, List[dict]]:
    """{"train": rows, "validation": rows}; a row has `instruction` (as written), `output` (as read) and `kind`.

    The same seed gives the same rows. No row is there twice, and no sentence of the held-out rows occurs in training.
    """
    draw = random.Random(seed)
    phrases = TRAINING_ROWS * 6 // 10
    train = _rows(PHRASES, phrases, draw) + _rows(TRAINING, TRAINING_ROWS - phrases, draw)
    return {"train": train, "validation": _rows(HELD_OUT, HELD_OUT_ROWS, draw)}


def korean_number_phrases(seed: int = 0) -> Dict[str, List[dict]]:
    """Short rows of few kinds, with numbers again and again. No row of the held-out ones is in training."""
    draw = random.Random(seed)
    phrases = list(DEMO.items())
    held_out: Dict[str, dict] = {}
    while len(held_out) < DEMO_HELD_OUT_ROWS:
        row = _row(*draw.choice(phrases), draw)
        held_out[row["instruction"]] = row
    train: List[dict] = []
    while len(train) < DEMO_ROWS:
        row = _row(*draw.choice(phrases), draw)
        if row["instruction"] not in held_out:
            train.append(row)
    return {"train": train, "validation": list(held_out.values())}


def korean_number_chats(seed: int = 0) -> Dict[str, List[dict]]:
    """The rows of `korean_number_phrases` as conversations: of four questions for training, of one to hold out."""
    splits = korean_number_phrases(seed)
    train = [_conversation(splits["train"][first : first + 4]) for first in range(0, DEMO_ROWS, 4)]
    return {"train": train, "validation": [_conversation([row]) for row in splits["validation"]]}


def _conversation(rows: List[dict]) -> dict:
    messages = []
    for row in rows:
        messages.append({"role": "user", "content": row["instruction"]})
        messages.append({"role": "assistant", "content": row["output"]})
    messages[0]["content"] = f"{REQUEST} {rows[0]['instruction']}"
    return {"messages": messages, "kind": rows[-1]["kind"]}


def _rows(sentences: Dict[str, List[str]], count: int, draw: random.Random) -> List[dict]:
    """`count` different rows, the kinds by their shares."""
    kinds = list(sentences)
    shares = [SHARES[kind] for kind in kinds]
    rows: Dict[str, dict] = {}
    while len(rows) < count:
        kind = draw.choices(kinds, shares)[0]
        row = _row(kind, draw.choice(sentences[kind]), draw)
        rows[row["instruction"]] = row
    return list(rows.values())


def _row(kind: str, sentence: str, draw: random.Random) -> dict:
    written, read = fill(sentence, draw)
    return {"instruction": written, "output": read, "kind": kind}
