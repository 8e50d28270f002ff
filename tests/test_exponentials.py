"""Exponentials in the place of logits: their kernels, and the error of keeping them in bfloat16."""

import pytest
import torch
from interpreter import assert_passes


def test_exponentials_in_the_interpreter(tmp_path):
    assert_passes("interpreted_exponentials.py", tmp_path)


def test_steps_in_the_interpreter(tmp_path):
    assert_passes("interpreted_steps.py", tmp_path)


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("std", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("kind", ["any label", "peaked"])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_error_is_that_of_rounding_the_gradient_of_the_logits(std, kind, entropy):
    """F and factor of linear_exponentials.py with its roundings, beside the gradient of the logits
    rounded once; products in float64, so that nothing else is compared.
    """
    torch.manual_seed(0)
    N, H, V = 1024, 64, 2048
    weight = torch.randn(V, H).bfloat16().double()
    hidden = (torch.randn(N, H) * std / H**0.5).bfloat16().double()
    z = hidden @ weight.T
    labels = torch.randint(0, V, (N,))
    if kind == "peaked":
        z = z * 3
        labels = z.argmax(-1)
    one = torch.nn.functional.one_hot(labels, V).bool()
    g, h = torch.randn(2, N, 1).double() * torch.tensor([[[1.0]], [[float(entropy)]]])
    logp = z.log_softmax(-1)
    p, H_of_p = logp.exp(), -(logp.exp() * logp).sum(-1, keepdim=True)
    draw = g * (one.double() - p) - h * p * (logp + H_of_p)

    # What the kernels do: E and F in bfloat16, factor * hidden in bfloat16.
    reference = torch.maximum(z[:, :64].amax(-1, keepdim=True), z[one][:, None])
    E = (z - reference).exp()
    s = E.sum(-1, keepdim=True)
    rounded = E.bfloat16().double()
    assert (s < 2.0**32 * V).all()
    if entropy:
        of_e = torch.where(one, logp, rounded.clamp_min(1e-300).log() - s.log())
        F = torch.where(one, p * s, rounded) * (g + h * (of_e + H_of_p)) - one * (g * s)
        factor = -1 / s
    else:
        F, factor = torch.where(one, E - s, rounded), -g / s
    F = F.bfloat16().double()
    scaled = (factor * hidden).bfloat16().double()

    exact = draw @ weight, draw.T @ hidden
    today = draw.bfloat16().double() @ weight, draw.bfloat16().double().T @ hidden
    ours = factor * (F @ weight), F.T @ scaled
    assert relative(ours[0], exact[0]) <= (1.5 if entropy else 1.1) * relative(today[0], exact[0])
    # dweight has the rounding of factor * hidden, too; both have that of dweight itself.
    handed = [relative(t.bfloat16(), exact[1]) for t in (ours[1], today[1])]
    assert handed[0] <= (1.45 if entropy else 1.3) * handed[1] and handed[0] < 3.5e-3
