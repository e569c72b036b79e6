"""WikiText's spacing is undone as lm-eval's task `wikitext` undoes it: one example a rule."""

import pytest

from sparsekd_ray.evaluate.wikitext import is_marked, without_spacing

RULES = [
    ("the bees ' hive", "the bees' hive"),
    ("a third @-@ rate film", "a third-rate film"),
    ("cost 12 @,@ 500 pounds", "cost 12,500 pounds"),
    ("grew 3 @.@ 5 %", "grew 3.5 %"),
    ("two parts : first ; second", "two parts: first; second"),
    ("He left . Why ? Go ! So , yes", "He left. Why? Go! So, yes"),
    ("a , . b", "a ,. b"),  # full stops come first: the comma then has no space behind it
    ("the end .", "the end ."),  # a mark at the end of the text keeps its space
    ("born ( in 1990 ) here", "born (in 1990) here"),
    ("he [ the king ] said", "he [the king] said"),
    ("a set { x }", "a set {x}"),
    ('the song " Help ! " was', 'the song "Help!" was'),
    ('two " lines \n here " end', 'two "lines\nhere" end'),
    ("the word ' yes ' was", "the word 'yes' was"),
    (" = Title = \n\n = = Part = = \n", " = Title =\n\n== Part ==\n"),
    ("= = = Section = = =", "=== Section ==="),
    ("= = = = Deep = = = =", "==== Deep ===="),
    ("at 20 ° C", "at 20°C"),
    ("one \n two", "one\ntwo"),
    ("about N people", "about 1 people"),
    ("the film 's end", "the film's end"),
]


@pytest.mark.parametrize(("spaced", "plain"), RULES)
def test_rule(spaced: str, plain: str) -> None:
    assert without_spacing(spaced) == plain


def test_only_wikitexts_own_marks_count_as_wikitext() -> None:
    assert is_marked(["plain text", "well @-@ known"]) and is_marked(["1 @,@ 000"]) and is_marked(["1 @.@ 5"])
    assert not is_marked(["Spaced , like this .", "mail me@-@home", ""])
