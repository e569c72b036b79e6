"""The model card of an exported directory: what the student is, how it was made, under what licence, how good it is.

Metadata and results are written by huggingface_hub, so that the hub and other tools read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Required, TypedDict

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sparsekd_ray.config.base import PROTOCOL_NAMES, ProtocolName
from sparsekd_ray.model import loading
from sparsekd_ray.model.origin import UNKNOWN, Origin

if TYPE_CHECKING:
    from sparsekd_ray.evaluate.protocols import Figure, Figures

Form = Literal["low-rank", "merged", "stock"]
NOT_MERGED = "its MLP matrices have biases, which the stock architecture cannot hold"

USAGE = """## Usage

From inside this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{code})
tokenizer = AutoTokenizer.from_pretrained("."{code})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


class CardFacts(TypedDict, total=False):
    """Facts on a model card that the model directory itself does not hold."""

    sparsity: Required[float]
    """Share of the dense model's MLP parameters that were removed or set to zero."""
    method: str
    """The pruning method's name."""
    made: str
    """What the method did to the model: a sentence without its full stop."""
    student_form: str
    """The form of the method's students: low-rank, narrower, shallower or masked."""
    distilled: bool
    """False for a student that was pruned and not trained afterwards."""
    perplexity: Figures
    dense_perplexity: Figures
    parameters: int
    biased: bool
    """True if the low-rank matrices have biases."""


def model_card(facts: CardFacts, form: Form, origin: Origin) -> str:
    """README.md of an exported directory: metadata and Markdown.

    `facts` must have `parameters`.
    """
    kind = facts.get("student_form", form) if form == "stock" else form
    title = f"{kind.capitalize()} student" + (f" of {origin.base_model}" if origin.base_model else "")
    parts = [
        f"# {title}",
        f"{_history(facts)} {_contents(facts, form)}",
        f"Parameters: {facts['parameters']:,}, tied embeddings counted once.",
        _license(origin),
        _perplexity_table(facts),
        USAGE.format(code=", trust_remote_code=True" if form == "low-rank" else ""),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_metadata(facts, form, origin, title).to_yaml()}\n---\n\n{body}"))


def _metadata(facts: CardFacts, form: Form, origin: Origin, title: str) -> ModelCardData:
    method = facts.get("method")
    results = list(_results(facts))
    return ModelCardData(
        base_model=origin.base_model,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparsekd-ray", "knowledge-distillation", "pruning", *([method] if method else []), form],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _history(facts: CardFacts) -> str:
    """How the student was made."""
    made = facts.get("made", "Pruned by sparsekd-ray")
    distilled = ", then trained to recover by self-distillation (SparseKD)"
    return f"{made}{distilled if facts.get('distilled', True) else ''}."


def _contents(facts: CardFacts, form: Form) -> str:
    """What the sparsity means for the weights, the size and the speed of this form."""
    share = f"{facts['sparsity']:.1%} of the dense model's MLP parameters"
    if form == "low-rank":
        text = (
            f"Its MLP matrices are products of two thin ones, so that {share} are gone; "
            f"`{loading.MODELLING_CODE}.py` beside the weights is the architecture."
        )
        return f"{text} There is no merged form, because {NOT_MERGED}." if facts.get("biased") else text
    if form == "merged":
        return (
            f"The student is low-rank, without {share}. Here its products are multiplied out, which gives the same "
            "function as a stock model, of the dense model's size and speed."
        )
    if facts.get("student_form") == "masked":
        return f"{share} are zeros, in a stock model of the dense model's size: no stock runtime is faster for it."
    return (
        f"{share} are gone; what is left is a smaller model of the stock architecture, which needs no code."
    )


def _license(origin: Origin) -> str:
    dense = f"the dense model, {origin.base_model}" if origin.base_model else "the dense model"
    if origin.license == UNKNOWN:
        return f"Licence: unknown, because the card of {dense} states none. It binds this student too."
    return f"Licence: {origin.license_name or origin.license}, that of {dense}."


def _results(facts: CardFacts) -> Iterator[EvalResult]:
    """The perplexities as the hub's metadata holds them: one for each protocol and text."""
    for protocol, text, figures in _figures(facts.get("perplexity")):
        measured = facts["perplexity"][protocol]
        yield EvalResult(
            task_type="text-generation",
            dataset_type="held-out" if text == "all" else text,
            dataset_name="all held-out text" if text == "all" else f"held-out text of {text}",
            dataset_split="test",
            metric_type="word_perplexity" if protocol == "words" else "perplexity",
            metric_name=f"{protocol} protocol",
            metric_value=round(figures["ppl"], 4),
            metric_args={"window": measured["window"], "stride": measured["stride"]},
        )


def _figures(measured: Figures | None) -> Iterator[tuple[ProtocolName, str, Figure]]:
    """Protocol, text ("all" or a domain) and figure of everything that was measured."""
    for protocol in PROTOCOL_NAMES:
        if measured and (overall := measured.get(protocol)):
            yield protocol, "all", overall
            for domain, figure in overall["domains"].items():
                yield protocol, domain, figure


def _perplexity_table(facts: CardFacts) -> str:
    """Held-out perplexity by protocol and domain, beside the dense model's; nothing without figures."""
    rows = ["| protocol | text | tokens | this model | dense |", "|---|---|--:|--:|--:|"]
    dense = {
        (protocol, text): figure["ppl"] for protocol, text, figure in _figures(facts.get("dense_perplexity"))
    }
    for protocol, text, figure in _figures(facts.get("perplexity")):
        reference = f"{dense[protocol, text]:.2f}" if (protocol, text) in dense else "–"
        rows.append(f"| `{protocol}` | {text} | {figure['tokens']:,} | {figure['ppl']:.2f} | {reference} |")
    if len(rows) == 2:
        return ""
    sentences = [
        f"- `{protocol}`: {measured['sentence']}."
        for protocol in PROTOCOL_NAMES
        if (measured := facts["perplexity"].get(protocol))
    ]
    return "\n\n".join(["## Perplexity on held-out text", "\n".join(rows), "\n".join(sentences)])
