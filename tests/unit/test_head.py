"""Logits are fp32 sums, and the same bits in the student's loss, evaluation, statistics and the teacher."""

import pytest
import torch
from models import FAMILIES, VOCABULARY, dense_model

from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.evaluate.perplexity import token_nll
from sparsekd_ray.model import head
from sparsekd_ray.prune.statistics import nll_gradient
from sparsekd_ray.teacher.forward import Forward
from sparsekd_ray.teacher.signal import Target, tempered, topk

TEMPERATURE = 2.0


def bf16_case(positions: int = 600, width: int = 64, vocabulary: int = 4096) -> tuple[torch.Tensor, ...]:
    """Hidden states and a head in bf16 whose logits reach about ±35, and a teacher near that student."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(positions, width).bfloat16()
    head_VD = torch.randn(vocabulary, width).bfloat16()
    logits_NV = hidden_ND.double() @ head_VD.double().T
    return hidden_ND, head_VD, logits_NV, logits_NV + 0.1 * torch.randn_like(logits_NV)


def target_at(teacher_NV: torch.Tensor, k: int = 32) -> Target:
    signal = topk(teacher_NV.float(), k, (TEMPERATURE,))
    logprobs, tail = tempered(signal.logprobs_NK, signal.log_z_NT[:, 0], TEMPERATURE)
    return Target(signal.ids_NK, logprobs, tail)


def kl_by_position(logits_NV: torch.Tensor, target: Target) -> torch.Tensor:
    """(K+1)-way KL in float64, written out."""
    q_NV = (logits_NV.double() / TEMPERATURE).softmax(-1)
    kept = torch.zeros_like(q_NV, dtype=torch.bool).scatter(1, target.ids_NK.long(), True)
    q_tail = q_NV.masked_fill(kept, 0).sum(-1)
    t = target.logprobs_NK.double().exp()
    ratio = target.logprobs_NK.double() - q_NV.gather(1, target.ids_NK.long()).log()
    return (t * ratio).sum(-1) + torch.xlogy(target.tail_N.double(), target.tail_N.double() / q_tail)


def test_bf16_weights_do_not_round_the_logits_of_a_loss():
    hidden_ND, head_VD, exact_NV, teacher_NV = bf16_case()
    target, count = target_at(teacher_NV), len(hidden_ND)
    expected_N = kl_by_position(exact_NV, target)
    rounded_N = kl_by_position(hidden_ND @ head_VD.T, target)
    wide_N = kl_by_position(head.logits(hidden_ND, head_VD), target)
    assert (rounded_N - expected_N).abs().mean() > 1e-4, "the fault that this test is about"
    assert (wide_N - expected_N).abs().mean() < 1e-6
    labels_N = exact_NV.argmax(-1)
    _, kl, ce = kd_loss(
        hidden_ND, head_VD, labels_N, target, temperature=TEMPERATURE, kl_weight=1.0, ce_weight=1.0
    )
    assert kl.item() / count == pytest.approx(expected_N.mean().item(), abs=1e-6)
    nll = torch.nn.functional.cross_entropy(exact_NV, labels_N)
    assert ce.item() / count == pytest.approx(nll.item(), abs=1e-6)


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32():
    hidden_ND, head_VD, exact_NV, teacher_NV = bf16_case(positions=1500)
    labels_N = teacher_NV.argmax(-1)
    weight = head_VD.clone().requires_grad_()
    loss, _, _ = kd_loss(
        hidden_ND,
        weight,
        labels_N,
        target_at(teacher_NV),
        temperature=TEMPERATURE,
        kl_weight=0.0,
        ce_weight=1.0,
    )
    loss.backward()
    grad_NV = exact_NV.softmax(-1) - torch.nn.functional.one_hot(labels_N, len(head_VD))
    expected = grad_NV.T @ hidden_ND.double()
    error = (weight.grad.double() - expected).norm() / expected.norm()
    assert error < 2**-8, "one rounding to bf16 at the end, and one of the gradient to the logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_student_evaluation_statistics_and_teacher_share_their_logits(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    model = dense_model(family, tied=True).to(dtype)
    ids_BL = torch.randint(0, VOCABULARY, (11, 60))  # 649 predictions: one whole chunk and a part of one
    with torch.no_grad():
        hidden_BLD = head.hidden_states(model, ids_BL)
    labels_N, head_VD = ids_BL[:, 1:].flatten(), head.weight(model).detach()
    target = target_at(torch.randn(len(labels_N), VOCABULARY), k=4)

    made: list[torch.Tensor] = []
    honest = head.logits

    def spy(hidden_nD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
        made.append(honest(hidden_nD, head_VD))
        return made[-1].clone()  # the loss uses up the memory

    monkeypatch.setattr(head, "logits", spy)
    monkeypatch.setattr(head, "hidden_states", lambda _, ids: hidden_BLD[:, : ids.shape[1]])
    callers = {
        "student": lambda: kd_loss(
            hidden_BLD[:, :-1].flatten(0, 1),
            head_VD,
            labels_N,
            target,
            temperature=2.0,
            kl_weight=1,
            ce_weight=1,
        ),
        "evaluation": lambda: token_nll(model, ids_BL),
        "statistics": lambda: nll_gradient(hidden_BLD, head_VD, ids_BL),
        "teacher": lambda: list(Forward(model).logits(ids_BL)),
    }
    found: dict[str, torch.Tensor] = {}
    for name, call in callers.items():
        made.clear()
        with torch.no_grad():
            call()
        assert [len(logits_nV) for logits_nV in made] == [head.ROWS_PER_CHUNK, 649 - head.ROWS_PER_CHUNK]
        found[name] = torch.cat(made)
    for name, logits_NV in found.items():
        assert logits_NV.dtype == torch.float32
        assert torch.equal(logits_NV, found["student"]), name


def test_a_chunk_is_the_product_in_the_weights_own_precision():
    hidden_ND, head_VD = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(next(head.chunks(hidden_ND, head_VD)), hidden_ND @ head_VD.T)


@pytest.mark.parametrize("flag", ["output_attentions", "output_hidden_states", "return_dict"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flags_in_a_config_do_not_change_what_the_head_is_given(family: str, flag: str) -> None:
    ids_BL = torch.arange(20)[None]
    model, plain = (dense_model(family, True, **flags) for flags in ({flag: flag != "return_dict"}, {}))
    assert torch.allclose(head.hidden_states(model, ids_BL), head.hidden_states(plain, ids_BL), atol=1e-6)
