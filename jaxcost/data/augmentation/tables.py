"""Small tables of ours: words of one meaning, keys beside one another, characters of a like shape."""

from __future__ import annotations

_ALIKE = """
begin start commence / end finish stop / buy purchase / big large huge / small little tiny / fast quick rapid / slow
sluggish / good fine great / bad poor awful / begin start / get obtain receive / give hand / help assist aid / want wish
desire / need require / tell inform notify / show display / send dispatch ship / buy purchase acquire / pay settle /
money cash funds / refund repayment reimbursement / package parcel delivery / order purchase / account profile / close
shut / open unlock / change alter modify / update revise / cancel revoke / lost missing / stolen taken / broken damaged
faulty / report announce / reported announced / said stated / company firm business / sales turnover revenue / profit
earnings / loss deficit / cost expense / costs expenses / debt borrowings / rose increased climbed grew / rise increase
climb grow / fell declined dropped decreased / fall decline drop decrease / jumped surged soared / shrank contracted /
quarter trimester / year twelvemonth / market marketplace / clearly markedly noticeably / customer client buyer /
customers clients buyers / complaint grievance / complaints grievances / office branch / offices branches / publish
release issue / new fresh novel / head chief leader / home domestic / share stake / shares stocks / person human agent /
talk speak chat / phone telephone mobile / shoes footwear / bag handbag / table desk / book volume / lamp light / jacket
coat / laptop notebook / camera photocamera / address location / password passcode / urgent pressing / hurry rush /
thanks cheers / hello hi hey / please kindly / possible feasible / mistake error / wrong incorrect false / right correct
/ old previous former / twice doubly / today now / shop store / know learn / find discover locate / track trace follow /
think believe suppose / sure certain / understand comprehend / leave depart / remove delete erase / data information /
real genuine actual / film movie picture / happy glad pleased / sad unhappy / angry furious / love adore / hate detest /
beautiful lovely pretty / ugly unsightly / easy simple / hard difficult / important significant / problem issue trouble
/ answer reply response / question query / job work / house home / car vehicle / child kid / city town / country nation
/ doctor physician / road street / teacher instructor / test exam / idea notion / use employ utilise / make create
produce / see notice / look glance / walk stroll / run sprint / eat consume / price charge / cheap inexpensive
/ expensive costly / rich wealthy / strong powerful / weak feeble / clever smart bright / stupid foolish
/ strange odd weird / quiet silent / loud noisy / near close / whole entire / often frequently
/ seldom rarely / almost nearly / also too
/ about regarding concerning
"""


def _synonyms() -> dict[str, tuple[str, ...]]:
    """The other words of each word's groups, in the order of the table."""
    found: dict[str, dict[str, None]] = {}
    for group in _ALIKE.replace("\n", " ").split("/"):
        words = group.split()
        for word in words:
            found.setdefault(word, {}).update(dict.fromkeys(other for other in words if other != word))
    return {word: tuple(others) for word, others in found.items()}


SYNONYMS = _synonyms()
"""Other words of one meaning, by word in small letters."""

_ROWS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """The keys beside each, and above and below it, on an American keyboard, whose rows stand half a key further on."""
    found = {}
    for row, keys in enumerate(_ROWS):
        for column, key in enumerate(keys):
            places = [(row, column - 1), (row, column + 1)]
            places += [(row - 1, column), (row - 1, column + 1), (row + 1, column - 1), (row + 1, column)]
            near = [_ROWS[r][c] for r, c in places if 0 <= r < len(_ROWS) and 0 <= c < len(_ROWS[r])]
            found[key] = "".join(near)
    return found


NEIGHBOURS = _neighbours()
"""Keys beside each key."""

SHAPES = {
    "0": "oO", "o": "0", "O": "0", "1": "lI", "l": "1I", "I": "l1", "i": "l", "5": "S", "S": "5", "s": "5", "8": "B",
    "B": "8", "6": "b", "b": "6", "g": "9q", "q": "g", "9": "g", "2": "Z", "Z": "2", "z": "2", "e": "c", "c": "e",
    "u": "v", "v": "u", "h": "b", "n": "r", "t": "f", "f": "t", "m": "n", "G": "6", "D": "O", "Q": "O", "E": "F",
}  # fmt: skip
"""Characters that a scanner takes each for."""
