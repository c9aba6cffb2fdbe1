"""The starts that the artifact part compares: of what they are, and whether they answer alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LLAMA3_8B, TINY = FOLDER / "llama3_8b.json", FOLDER / "tiny_llama.json"  # config.json of each
# Few programs, at most two steps for the prompts.
SIZES: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 128}
TINY_SIZES = SIZES | {"max_num_batched_tokens": 32}
# Each is a process of its own: programs of the artifact, compiled there, and found where the
# second left them.
STARTS = ("artifact", "uncached", "cached")
COMPARED = (("artifact", "uncached"), ("cached", "uncached"))


def model_file(dry_run: bool) -> Path:
    return TINY if dry_run else LLAMA3_8B


def sizes(dry_run: bool) -> dict[str, Any]:
    return TINY_SIZES if dry_run else SIZES


def compile_flags(model: Path, target: str, sizes: Mapping[str, int], output: str) -> list[str]:
    """Of `python -m xlinfer.compile`."""
    flags = {"model": model, "target": target, **sizes, "output": output}
    return [f"--{name}={value}" for name, value in flags.items()]


def compile_command() -> str:
    """What writes the artifact, on a machine that needs no GPU."""
    model = LLAMA3_8B.relative_to(FOLDER.parents[1])
    return " ".join(["python -m xlinfer.compile", *compile_flags(model, "h200", SIZES, "DIR")])


def comparisons(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the starts that answered."""
    answers = {r["start"]: r["answers"] for r in records if "answers" in r}
    return [
        {"compared": [one, other], **compare(answers[one], answers[other])}
        for one, other in COMPARED
        if one in answers and other in answers
    ]


def compare(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict:
    """Two lists of answers, one for each prompt: their tokens; beside each its log-probability and
    its `lead`, by how much that is above the next best token's.

    Log-probabilities are compared up to where the tokens part: what follows has other contexts.
    """
    firsts, apart, agreed = [], [], 0
    for prompt, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        same = next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        agreed += same
        apart += [abs(a["logprobs"][i] - b["logprobs"][i]) for i in range(same)]
        if same < len(pairs):
            tokens, lead = list(pairs[same]), b["lead"][same]
            firsts.append({"prompt": prompt, "at": same, "tokens": tokens, "lead": lead})
    return {
        "equal": not firsts,
        "tokens": sum(len(b["tokens"]) for b in theirs),
        "tokens_agreed": agreed,
        "first_differences": firsts,
        "largest_logprob_difference": max(apart, default=None),
    }


def faults(records: Sequence[Mapping[str, Any]], dry_run: bool) -> int:
    """Answers that are not alike, and artifacts that were traced or compiled after all. One that
    is refused, by other versions say, is no fault but on the machine that wrote it."""
    unlike = sum(not r["equal"] for r in records if "compared" in r)
    artifacts = [r for r in records if r.get("start") == "artifact"]
    worked = sum(r["traces"] + r["compiles"] > 0 for r in artifacts if "answers" in r)
    return unlike + worked + sum(dry_run for r in artifacts if "refused" in r)
