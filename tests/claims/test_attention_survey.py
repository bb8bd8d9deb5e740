"""The claim runs, its models differ in their score alone, and the control is as large as what it is compared with."""

import pytest
import torch
from torch import nn

from regard.bench.cost import parameters
from regard.claims import attention_survey as claim


def test_smoke() -> None:
    rows = claim.run("smoke", 1)
    assert len(rows) == 6
    assert [row.bar for row in rows if row.bar is not None] == [0.95, 0.70, 3.0, 3.0]


def test_control_has_as_many_parameters() -> None:
    sizes = {name: parameters(make()) for name, make in claim.MODELS.items()}
    assert sizes["no attention"] == pytest.approx(sizes["additive"], rel=0.1)
    assert sizes["no attention"] >= max(sizes.values())


@pytest.mark.parametrize("name", ["additive", "dot", "general"])
def test_weights_are_the_softmax_of_the_score(name: str) -> None:
    torch.manual_seed(0)
    model = claim.MODELS[name]().double()
    assert isinstance(model, claim.Attentive)
    q, k = torch.randn(2, 3, claim.DIM, dtype=torch.float64), torch.randn(2, 5, claim.DIM, dtype=torch.float64)
    found = model.weights(q, k)
    for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        scores = []
        for j in range(5):
            if name == "dot":
                scores.append(q[b, i] @ k[b, j])
            elif name == "general":
                scores.append(q[b, i] @ model.w @ k[b, j])
            else:
                scores.append(model.out @ (model.w_q @ q[b, i] + model.w_k @ k[b, j] + model.b).tanh())
        torch.testing.assert_close(found[b, i], torch.stack(scores).softmax(0), rtol=0, atol=1e-12)
    gathered = model.gather(q, k)
    torch.testing.assert_close(gathered[0, 1, : claim.DIM], found[0, 1] @ k[0])
    torch.testing.assert_close(gathered[..., claim.DIM :], q)


@pytest.mark.parametrize("name", claim.MODELS)
def test_writing_is_what_the_model_says_of_what_it_wrote(name: str) -> None:
    torch.manual_seed(0)
    model = claim.MODELS[name]()
    source = torch.randint(claim.VOCABULARY, (3, 6))
    written = model.write(source)
    before = nn.functional.pad(written[:, :-1], (1, 0), value=claim.START)
    assert torch.equal(model(source, before).argmax(-1), written)


def test_without_attention_the_last_state_is_all() -> None:
    torch.manual_seed(0)
    source, target = torch.randint(claim.VOCABULARY, (2, 6)), torch.full((2, 1), claim.START)
    plain, attentive = claim.MODELS["no attention"](), claim.MODELS["dot"]()
    for model, reads in ((plain, False), (attentive, True)):
        tokens = model.tokens(source).detach().requires_grad_()
        read, state = model.reader(tokens)
        written, _ = model.writer(model.tokens(target), state.detach())
        model.merge(model.gather(written, read)).sum().backward()
        assert (tokens.grad is not None and bool(tokens.grad.any())) is reads
