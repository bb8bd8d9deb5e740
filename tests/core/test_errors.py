"""Bad input: the message says what was got, what was expected and what to do, before anything is changed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import regard as rg
from regard.core.call import OpaqueSite
from regard.core.edit import Edit

C, L = 8, 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0, batch_first=True)


X = torch.randn(2, L, C, generator=torch.Generator().manual_seed(0))


class ByHand(nn.Module):
    num_heads = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        return ((x @ x.transpose(-1, -2)).softmax(-1) @ x)[:, 0]


def same(x: torch.Tensor, call: object) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda m: rg.sites(m), r"runs the model once: give its inputs, or run="),
        (lambda m: rg.capture(m, "self_atn"), r"where='self_atn' names no attention site of .*; nearest: self_attn"),
        (lambda m: rg.capture(m, "cross"), r"where='cross' names no attention site of .*kinds here: self"),
        (lambda m: rg.capture(m, ["a.*", "b.*"]), r"where='a\.\*, b\.\*' names no attention site"),
        (lambda m: rg.edit(m, Edit.v(same), where="linear1"), r"where='linear1' names no .*nearest: self_attn"),
        (lambda m: rg.edit(m), r"edit\(\) needs at least one Edit"),
        (lambda m: rg.edit(m, Edit.v(same), steps=-1), r"steps=-1 must count from the front"),
        (lambda m: rg.edit(m, Edit.v(same), steps=slice(-3, None)), r"steps=slice\(-3, None, None\) must count from"),
        (lambda m: rg.edit(m, Edit.v(same), steps=slice(5, -1)), r"steps=slice\(5, -1, None\) must count from"),
        (lambda m: rg.edit(m, Edit.v(same), steps=range(3, -2, -1)), r"steps=range\(3, -2, -1\) must count from"),
        (lambda m: Edit("values", same), r"quantity='values' is not one of kv, "),
        (lambda m: Edit.v(same, branch="positive"), r"branch='positive' is not 'cond' or 'uncond'"),
        (lambda m: Edit.mask(torch.ones(L, L)), r"mask must be boolean.*got torch\.float32"),
        (lambda m: Edit.mask(torch.ones(L, L) > 0, strength=0.5), r"strength=0\.5: an edit of mask is on"),
        (lambda m: Edit.share({0: 1}, strength=0.5), r"strength=0\.5: an edit of share is on"),
        (lambda m: Edit.kv(lambda k, v, call: (k, v), only=[0]), r"only= does not apply to keys and values"),
        (lambda m: Edit.scale_keys(0, 0.0, renormalize=True), r"factor=0\.0 must be positive"),
        (lambda m: rg.tokens(m, q="cls + image[4"), r"'image\[4' is not a segment such as cls, text\[77\]"),
        (lambda m: rg.tokens(m, q="cls + cls"), r"'cls \+ cls' names a role twice"),
        (lambda m: rg.apply(m, "flatten"), r"method='flatten' is a layer; apply\(\) takes accelerators"),
        (lambda m: rg.apply(m, object()), r"object has neither edits\(site, step\) nor attach\(model\)"),
    ],
)
def test_refused_at_once(attempt: Callable[[nn.Module], object], message: str) -> None:
    host = model()
    rg.sites(host, X)
    with pytest.raises(ValueError, match=message):
        attempt(host)
    assert all(
        not m._forward_hooks and not m._forward_pre_hooks and "_regard_taps" not in m.__dict__ for m in host.modules()
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            Edit.v(lambda v, call: v[..., :2]),
            r"self_attn: the edit of v returned \(2, 2, 5, 2\), expected \(2, 2, 5, 4\)",
        ),
        (Edit.out(lambda out, call: out[:1]), r"the edit of out returned \(1, 2, 5, 4\), expected \(2, 2, 5, 4\)"),
        (Edit.weights(lambda w, call: w.sum(-1)), r"the edit of weights returned \(2, 2, 5\), expected \(2, 2, 5, 5\)"),
        (Edit.heads([1.0, 0.0, 1.0]), r"self_attn has 2 heads; the gate has 3"),
        (Edit.v(same, only=[2]), r"2.* outside 0\.\.1"),
        (Edit.share({0: 2}), r"share\(\{0: 2\}\): the batch at self_attn has 2 rows"),
        (
            Edit.scale_keys("text[3:5]", 2.0),
            r"'text\[3:5\]': the key tokens of self_attn have no names.*regard\.tokens",
        ),
        (Edit.scale_keys(5, 2.0), r"row 5 is outside 0\.\.4"),
        (Edit.scale_keys([1, 9], 2.0), r"\[1, 9\] are outside 0\.\.4"),
        (Edit.mask(torch.ones(L, 4) > 0), r"self_attn: the mask \(5, 4\) does not fit scores of \(2, 2, 5, 5\)"),
        (Edit.bias(torch.ones(3, L, L)), r"self_attn: the bias \(3, 5, 5\) does not fit scores of \(2, 2, 5, 5\)"),
    ],
)
def test_refused_when_the_site_runs(edit: Edit, message: str) -> None:
    host = model()
    plain = host(X)
    with pytest.raises(ValueError, match=message), rg.edit(host, edit):
        host(X)
    assert torch.equal(host(X), plain)


def test_queries_and_keys_of_a_hand_written_site_must_have_been_seen() -> None:
    host = nn.Sequential(ByHand())
    plain = host(X)
    for edit in (Edit.q(same), Edit.k(same), Edit.share({0: 1})):
        with pytest.raises(
            ValueError, match=r"0 computes its attention by hand: run regard\.sites\(model, \.\.\.\) once"
        ):
            with rg.edit(host, edit):
                host(X)
    rg.sites(host, X)
    with rg.edit(host, Edit.k(lambda k, call: -k)):
        assert not torch.equal(host(X), plain)


def test_what_a_capture_has_not_seen() -> None:
    host = model()
    rg.sites(host, X)
    with rg.capture(host) as cap:
        pass
    for ask in (lambda: cap["self_attn"], lambda: cap.calls("self_attn"), lambda: cap["self_*"]):
        with pytest.raises(KeyError, match=r"self_.* called: nothing"):
            ask()
    with rg.capture(host) as cap:
        host(X)
    with pytest.raises(KeyError, match=r"'other\.\*' names no site that was called; called: self_attn"):
        cap["other.*"]
    with pytest.raises(KeyError, match=r"no site is called 'self_atn'; nearest: self_attn"):
        rg.sites(host, X)["self_atn"]


def test_names_given_to_tokens_of_another_number_are_not_used() -> None:
    host = model()
    rg.sites(host, X)
    rg.tokens(host, q="text[7]")
    with rg.capture(host) as cap:
        host(X)
    assert cap["self_attn"].tokens_k is None
    rg.tokens(host, q="cls + text[4]", where="self")
    with rg.capture(host) as cap:
        host(X)
    assert str(cap["self_attn"].tokens_k) == "cls + text[4]"
    assert cap["self_attn"].weights(rows="text[1:3]").shape == (2, 2, 2, L)
    with pytest.raises(ValueError, match=r"role='txt' is not in cls \+ text\[4\]; did you mean 'text'"):
        cap["self_attn"].weights(rows="txt[0]")
    with pytest.raises(ValueError, match=r"text\[4\]': text has 4 tokens"):
        cap["self_attn"].weights(rows="text[4]")


def test_a_failed_probe_keeps_what_was_known() -> None:
    host = model()
    rg.sites(host, X)
    with pytest.raises(AssertionError, match="embedding dimension"):
        rg.sites(host, X[..., :3])
    with rg.capture(host, "self") as cap:
        host(X)
    assert list(cap) == ["self_attn"]


class Renormalised(ByHand):
    """Changes its weights in place between the softmax and the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        weights = (x @ x.transpose(-1, -2)).softmax(-1)
        weights *= torch.linspace(0.5, 1.5, L)
        return (weights @ x)[:, 0]


def test_weights_changed_in_place_make_a_site_opaque() -> None:
    host = nn.Sequential(Renormalised())
    (site,) = rg.sites(host, X)
    assert not site.verified
    assert "weights times values differ from its output" in site.reason
    with rg.capture(host) as cap:
        host(X)
    with pytest.raises(OpaqueSite, match="0 is opaque"):
        cap["0"].weights()
