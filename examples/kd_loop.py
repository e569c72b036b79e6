"""The method in one process, without Ray: cache the dense model's probabilities, prune it, distill it from the cache.

    python examples/kd_loop.py                           a small byte-level model, trained first; under a minute
    python examples/kd_loop.py --model DIRECTORY         a Hugging Face directory of a supported family

Shapes: S sequences, B of a batch, L tokens, P = L − 1 predictions of each, N = B · P, K kept ids, D hidden, I neurons.
"""

from itertools import islice

import torch
import tyro
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

from sparsekd_ray.corpus import embedded
from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.distill.schedule import learning_rate
from sparsekd_ray.evaluate.perplexity import perplexity, token_nll
from sparsekd_ray.model import head, loading, spec
from sparsekd_ray.model.mlp import mlp_of, with_width
from sparsekd_ray.prune import neurons, statistics
from sparsekd_ray.teacher.signal import Target, tempered, topk

L, B, K, TEMPERATURE, ALPHA = 64, 8, 16, 2.0, 0.5


def text(encode, documents, sequences):
    """Token ids [S, L] of the first documents, joined and cut."""
    ids = (token for document in documents for token in encode(document))
    return torch.tensor(list(islice(ids, sequences * L))).view(-1, L)


@torch.no_grad()
def cache(dense, ids_SL):
    """The teacher's k likeliest ids at `TEMPERATURE` and the exact mass of all others: [S · P, K]."""
    targets = []
    for ids_BL in ids_SL.split(B):
        hidden_ND = head.hidden_states(dense, ids_BL)[:, :-1].flatten(0, 1)
        kept = topk(head.logits(hidden_ND, head.weight(dense)), K, (TEMPERATURE,))
        targets.append(Target(kept.ids_NK, *tempered(kept.logprobs_NK, kept.log_z_NT[:, 0], TEMPERATURE)))
    return Target(*(torch.cat(column) for column in zip(*targets, strict=True)))


def prune(dense, ids_SL, sparsity):
    """Removes neurons of every MLP one by one. The remaining neurons are fitted to the MLP's former output."""
    layers, hidden = dense.config.num_hidden_layers, dense.config.hidden_size
    width = neurons.width(spec.mlp_parameters(dense), sparsity, hidden, layers, align=1)
    measured, mlps = statistics.collect(dense, ids_SL, range(layers)), []
    for layer in range(layers):
        mlp, gram_II = mlp_of(dense, layer), measured[layer]["inner.gram"]
        mlps.append(neurons.prune_mlp(mlp, gram_II, neurons.eliminate(mlp.down_DI, gram_II, width)))
    return with_width(dense, mlps)


def train(model, ids_SL, target, steps, lr, alpha=ALPHA):
    """α · T² · KL to the cache + (1 − α) · cross-entropy; alpha 0 is plain training."""
    optimizer, order = torch.optim.AdamW(model.train().requires_grad_(True).parameters()), torch.Generator()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, 0.05)
        rows_B = torch.randint(len(ids_SL), (B,), generator=order)
        rows_N = (rows_B[:, None] * (L - 1) + torch.arange(L - 1)).flatten()
        part = Target(*(column[rows_N] for column in target))
        hidden_ND = head.hidden_states(model, ids_SL[rows_B])[:, :-1].flatten(0, 1)
        weights = {"kl_weight": alpha / len(rows_N), "ce_weight": (1 - alpha) / len(rows_N)}
        labels_N = ids_SL[rows_B, 1:].flatten()
        loss, *_ = kd_loss(hidden_ND, head.weight(model), labels_N, part, temperature=TEMPERATURE, **weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def judge(name, model, ids_SL):
    nll = [token_nll(model.eval(), ids_BL).double() for ids_BL in ids_SL.split(B)]
    ppl = perplexity([float(part.sum()) for part in nll], sum(part.numel() for part in nll))
    print(f"{name:<16} {spec.total_parameters(model):>12,} parameters   perplexity {ppl:.2f}", flush=True)
    return ppl


def main(
    model: str | None = None, sparsity: float = 0.65, steps: int = 150, sequences: int = 512, lr: float = 2e-3
) -> list[float]:
    """Perplexities of the dense model, and of the student before and after distillation, on held-out documents."""
    torch.manual_seed(0)
    documents = list(embedded.documents("docstrings", seed=0))
    encode = AutoTokenizer.from_pretrained(model).encode if model else lambda document: document.encode()
    train_SL = text(encode, documents[100:], sequences)
    test_SL = text(encode, documents[:100], 64)
    if model:
        dense = loading.load(model)
    else:
        shape = {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        tokens = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        dense = Phi3ForCausalLM(
            Phi3Config(**shape, **tokens, initializer_range=0.1, tie_word_embeddings=True)
        )
        train(dense, train_SL, cache(dense, train_SL), 4 * steps, lr=1e-2, alpha=0.0)
    dense_ppl = judge("dense", dense, test_SL)
    target = cache(dense, train_SL)
    student = prune(dense, train_SL[:64], sparsity)
    before = judge("pruned", student, test_SL)
    train(student, train_SL, target, steps, lr)
    return [dense_ppl, before, judge("pruned, distilled", student, test_SL)]


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
