"""Markup: every spelling of a tree leads back to it, and differences are counted as a slow recursion counts them."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.worlds.markup import (
    SIGNS,
    TOKENS,
    Fraction,
    Group,
    Node,
    Root,
    Row,
    Scripts,
    Sign,
    compact,
    decode,
    edit_distance,
    edit_score,
    encode,
    equivalent,
    normalise,
    parse,
    spell,
    split,
)

SIGN = st.sampled_from(SIGNS).map(Sign)


def rows(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Row]:
    return st.lists(nodes, min_size=1, max_size=4).map(tuple)


def larger(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    row = rows(nodes)
    group = st.lists(nodes, min_size=2, max_size=3).map(lambda parts: Group(tuple(parts)))
    base = SIGN | st.builds(Root, row) | st.builds(Fraction, row, row) | group
    scripts = st.builds(Scripts, base, row, st.none() | row) | st.builds(Scripts, base, st.none(), row)
    return st.builds(Fraction, row, row) | st.builds(Root, row) | scripts


TREES = rows(st.recursive(SIGN, larger, max_leaves=12))


def other_spelling(row: Row, draw: st.DrawFn) -> str:
    """The same tree with scripts in any order, needless braces, missing ones where they may miss, and spacing."""

    def argument(part: Row) -> str:
        inner = other_spelling(part, draw)
        bare = len(part) == 1 and isinstance(part[0], Sign)
        return inner if bare and draw(st.booleans()) else f"{{{inner}}}"

    found = ""
    for node in row:
        match node:
            case Sign(token):
                piece = f"{token} "
            case Fraction(above, below):
                piece = rf"\frac {argument(above)}{argument(below)}"
            case Root(body):
                piece = rf"\sqrt {argument(body)}"
            case Group(body):
                piece = f"{{{other_spelling(body, draw)}}}"
            case Scripts(base, below, above):
                scripts = [f"{sign}{argument(part)}" for sign, part in (("_", below), ("^", above)) if part is not None]
                order = draw(st.permutations(scripts))
                piece = other_spelling((base,), draw) + "".join(order)
        found += f"{{{piece}}}" if not isinstance(node, Group) and draw(st.booleans()) else piece
        found += draw(st.sampled_from(["", " ", r"\, ", r"\quad "]))
    return found


@settings(deadline=None)
@given(TREES)
def test_parsing_undoes_spelling(tree: Row) -> None:
    tokens = spell(tree)
    assert parse(" ".join(tokens)) == parse(compact(tokens)) == tree
    assert split(compact(tokens)) == tokens
    assert normalise(" ".join(tokens)) == " ".join(tokens)
    assert decode(encode(tokens)) == tokens


@settings(deadline=None)
@given(TREES, st.data())
def test_all_spellings_are_equivalent(tree: Row, data: st.DataObject) -> None:
    markup = other_spelling(tree, data.draw)
    assert normalise(markup) == " ".join(spell(tree))
    assert equivalent(markup, compact(spell(tree)))


@settings(deadline=None)
@given(TREES, TREES)
def test_trees_are_equivalent_to_themselves_alone(a: Row, b: Row) -> None:
    assert equivalent(compact(spell(a)), compact(spell(b))) == (a == b)


def test_spellings_by_hand() -> None:
    assert (
        normalise(r"x^2_1+\left(\alpha b\right)\le\frac12")
        == r"x _ { 1 } ^ { 2 } + ( \alpha b ) \leq \frac { 1 } { 2 }"
    )
    assert normalise(r"{{ab}}^{2}{c}") == "{ a b } ^ { 2 } c"
    assert normalise(r"{a^2}^3") == "{ a ^ { 2 } } ^ { 3 }"
    assert parse("a_{1}") == (Scripts(Sign("a"), (Sign("1"),), None),)
    assert not equivalent("a^{bc}", "a^bc")
    assert not equivalent("ab", "ba")
    assert not equivalent("a_1", "a^1")
    assert not equivalent("a^", "a^")
    assert compact([r"\pi", "a", r"\pi", "2", r"\pi", r"\pi", "_", "b"]) == r"\pi a\pi2\pi\pi_b"


@settings(deadline=None)
@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_edit_distance_is_the_recursion(a: str, b: str) -> None:
    @cache
    def slow(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == slow(len(a), len(b))
    assert edit_score(a, b) == 1 - slow(len(a), len(b)) / max(len(a), len(b), 1)


def test_numbers_of_tokens() -> None:
    assert len(set(TOKENS)) == len(TOKENS)
    ids = encode(["x", "^", "{", "2", "}"])
    assert [TOKENS[i] for i in ids] == ["<s>", "x", "^", "{", "2", "}", "</s>"]
    assert decode(torch.cat([ids, torch.tensor([0, 0, 9])])) == ["x", "^", "{", "2", "}"]
    assert decode(ids[:3]) == ["x", "^"]


@pytest.mark.parametrize(
    ("markup", "message"),
    [
        ("{a", "opens a brace that is not closed"),
        ("a}", "closes a brace that was not opened"),
        ("a^1^2", r"two scripts '\^'"),
        ("a_1^2_3", "two scripts '_'"),
        ("^2", "lacks something at token 0"),
        (r"\frac{a}", "lacks something at token 4"),
        (r"\sqrt", "lacks something at token 1"),
        ("a_", "lacks something at token 2"),
        ("{a_}", "lacks something at token 3"),
    ],
)
def test_bad_markup_is_refused(markup: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(markup)


def test_unknown_tokens_are_named() -> None:
    with pytest.raises(ValueError, match=r"tokens \['<s>', '\?'\] are not in the vocabulary"):
        encode(["a", "?", "<s>"])
