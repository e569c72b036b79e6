"""The chunked loss against its definition, written out naively with autograd."""

import pytest
import torch
import torch.nn.functional as F

from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.model.head import ROWS_PER_CHUNK
from sparsekd_ray.teacher.signal import Target, sampled, tempered, topk


def naive(hidden, head, labels, teacher_logits, k, temperature, kl_weight, ce_weight):
    """(K+1)-way KL between full softmaxes, the tail summed explicitly, plus cross-entropy."""
    logits = hidden @ head.T
    t, q = (teacher_logits / temperature).softmax(-1), (logits / temperature).softmax(-1)
    ids = teacher_logits.topk(k).indices
    kept = torch.zeros_like(t, dtype=torch.bool).scatter(1, ids, True)
    bucket_t = torch.cat([t.gather(1, ids), (t * ~kept).sum(-1, keepdim=True)], -1)
    bucket_q = torch.cat([q.gather(1, ids), (q * ~kept).sum(-1, keepdim=True)], -1)
    kl = (bucket_t * (bucket_t.clamp(min=1e-300).log() - bucket_q.log()))[labels >= 0].sum()
    ce = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return kl_weight * temperature**2 * kl + ce_weight * ce, kl, ce


def target_of(teacher_logits, k, temperature):
    signal = topk(teacher_logits, k, (temperature,))
    logprobs, tail = tempered(signal.logprobs_NK, signal.log_z_NT[:, 0], temperature)
    return Target(signal.ids_NK, logprobs, tail)


@pytest.mark.parametrize(
    "n, d, v, k", [(7, 5, 11, 3), (1, 4, 33, 1), (ROWS_PER_CHUNK + 13, 8, 50, 8), (9, 3, 12, 11)]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_value_and_gradients(n, d, v, k, temperature, weights):
    torch.manual_seed(n)
    hidden = torch.randn(n, d, dtype=torch.float64)
    head = torch.randn(v, d, dtype=torch.float64)
    teacher = 3 * torch.randn(n, v, dtype=torch.float64)
    labels = torch.randint(0, v, (n,))
    labels[::5] = -1
    h1, w1 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    h2, w2 = hidden.float().requires_grad_(), head.float().requires_grad_()
    expected = naive(h1, w1, labels, teacher, k, temperature, *weights)
    found = kd_loss(h2, w2, labels, target_of(teacher.float(), k, temperature), temperature=temperature,
                    kl_weight=weights[0], ce_weight=weights[1])  # fmt: skip
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f.double(), e.double(), rtol=2e-5, atol=2e-5)
    (3 * expected[0]).backward()
    (3 * found[0]).backward()
    torch.testing.assert_close(h2.grad.double(), h1.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w2.grad.double(), w1.grad, rtol=1e-4, atol=1e-4)


def test_a_frozen_head_gets_no_gradient():
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3)
    target = target_of(torch.randn(4, 9), 2, 2.0)
    loss, _, _ = kd_loss(hidden, head, torch.arange(4), target, temperature=2.0, kl_weight=1.0, ce_weight=1.0)
    loss.backward()
    assert head.grad is None and hidden.grad.abs().sum() > 0


def test_confident_student_and_teacher_stay_finite():
    """Logits so far apart that 1 − Σq is 0 in fp32."""
    head = torch.eye(6)
    hidden = torch.full((2, 6), -80.0).scatter(1, torch.tensor([[0], [5]]), 80.0).requires_grad_()
    target = target_of(hidden.detach().flip(0), 2, 1.0)
    loss, _, _ = kd_loss(
        hidden, head, torch.tensor([0, 5]), target, temperature=1.0, kl_weight=1.0, ce_weight=1.0
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_sample_is_a_sparse_full_kl(temperature):
    """Against KL to the estimate written out over the vocabulary, which need not sum to 1; padding included."""
    torch.manual_seed(0)
    n, d, v = 40, 6, 30
    hidden, head = torch.randn(n, d, dtype=torch.float64), torch.randn(v, d, dtype=torch.float64)
    signal = sampled(2 * torch.randn(n, v), temperature, 0.15, torch.rand(n))
    assert len((signal.exact_N + signal.drawn_N).unique()) > 1, "some positions must be padded"
    estimate = torch.zeros(n, v, dtype=torch.float64)
    for position in range(n):
        for place in range(int(signal.exact_N[position] + signal.drawn_N[position])):
            estimate[position, signal.ids_NK[position, place]] = (
                signal.logprobs_NK[position, place].double().exp()
            )
    h1, w1 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    log_q = (h1 @ w1.T / temperature).log_softmax(-1)
    expected = temperature**2 * (torch.xlogy(estimate, estimate) - estimate * log_q).sum()
    h2, w2 = hidden.float().requires_grad_(), head.float().requires_grad_()
    target = Target(signal.ids_NK, signal.logprobs_NK, torch.zeros(n))
    found, _, _ = kd_loss(
        h2,
        w2,
        torch.zeros(n, dtype=torch.long),
        target,
        temperature=temperature,
        kl_weight=1.0,
        ce_weight=0.0,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    found.backward()
    torch.testing.assert_close(h2.grad.double(), h1.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w2.grad.double(), w1.grad, rtol=1e-4, atol=1e-4)
