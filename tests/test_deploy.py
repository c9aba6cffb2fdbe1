"""The manifests of configs/deploy: by Kubernetes' own schemas, by those of the controllers for what
these add, and by xlinfer's own command lines."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from xlinfer.score.__main__ import ALL
from xlinfer.score.flags import parse as parse_score
from xlinfer.serve.flags import parse as parse_serve

DEPLOY = Path(__file__).parents[1] / "configs" / "deploy"
KUBERNETES = "1.34"
TEXT, COUNT, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
ANYTHING: dict[str, Any] = {}  # checked as what it is, by `parts_of`


def of(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


# What the controllers' definitions say of the fields outside pods and jobs: LeaderWorkerSet v1,
# JobSet v1alpha2, KubeRay v1.
METADATA = {"type": "object", "required": ["name"]}
RAY_GROUP = {
    "groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
    "numOfHosts": COUNT, "template": ANYTHING,
    "rayStartParams": {"type": "object", "additionalProperties": TEXT},
}  # fmt: skip
SPECS = {
    "LeaderWorkerSet": of(
        "leaderWorkerTemplate",
        replicas=COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=of(
            "workerTemplate",
            size=COUNT,
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
            leaderTemplate=ANYTHING,
            workerTemplate=ANYTHING,
        ),
    ),
    "JobSet": of(
        "replicatedJobs",
        failurePolicy=of("", maxRestarts=COUNT),
        replicatedJobs={
            "type": "array",
            "items": of("name template", name=TEXT, replicas=COUNT, template=ANYTHING),
        },
    ),
    "RayJob": of(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        shutdownAfterJobFinishes=SWITCH,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=of(
            "headGroupSpec",
            rayVersion=TEXT,
            enableInTreeAutoscaling=SWITCH,
            headGroupSpec=of(
                "template rayStartParams",
                rayStartParams=RAY_GROUP["rayStartParams"],
                template=ANYTHING,
            ),
            workerGroupSpecs={
                "type": "array",
                "items": of("groupName template rayStartParams", **RAY_GROUP),
            },
        ),
    ),
}
VERSIONS = {
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "RayJob": "ray.io/v1",
}
MANIFESTS = [
    (file.name, document)
    for file in sorted(DEPLOY.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
]


def templates(value: Any, key: str = "") -> list[dict]:
    """The templates of pods, and of jobs, in a controller's document."""
    if isinstance(value, list):
        return [found for one in value for found in templates(one)]
    if not isinstance(value, dict):
        return []
    if key.lower().endswith("template") and "spec" in value:
        return [value]
    return [found for name, one in value.items() for found in templates(one, name)]


@pytest.mark.parametrize(
    "name, document", MANIFESTS, ids=[f"{n}-{d['kind']}" for n, d in MANIFESTS]
)
def test_manifests_are_what_their_schemas_say(name, document):
    kind = document["kind"]
    if kind not in SPECS:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    assert document["apiVersion"] == VERSIONS[kind]
    whole = of("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA,
               spec=SPECS[kind])  # fmt: skip
    jsonschema.validate(document, whole)
    inner = templates(document["spec"])
    assert inner
    for template in inner:
        if "containers" in template["spec"]:
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        else:
            job = {"apiVersion": "batch/v1", "kind": "Job", **template}
            kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_what_is_no_manifest_is_found():
    """The schemas are strict: a misspelt field does not pass."""
    _, document = next(m for m in MANIFESTS if m[1]["kind"] == "LeaderWorkerSet")
    spec = document["spec"]
    with pytest.raises(jsonschema.ValidationError, match="'sizes' was unexpected"):
        jsonschema.validate(
            {**spec, "leaderWorkerTemplate": {**spec["leaderWorkerTemplate"], "sizes": 4}},
            SPECS["LeaderWorkerSet"],
        )
    pod = templates(spec)[0]
    wrong = {**pod, "spec": {**pod["spec"], "nodeSelectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "template": wrong}, KUBERNETES, strict=True
        )


def manifest_commands() -> list[tuple[str, list[str]]]:
    """What each container, and each Ray job, runs."""
    found = []
    for name, document in MANIFESTS:
        pods = templates(document["spec"])
        pods += [pod for job in pods for pod in templates(job["spec"])]
        for pod in pods:
            for container in pod["spec"].get("containers", ()):
                if "command" in container:
                    found.append((name, container["command"] + container["args"]))
        if entrypoint := document["spec"].get("entrypoint"):
            found.append((name, shlex.split(entrypoint)))
    return found


COMMANDS = manifest_commands()
SCRIPTS = [file for file in sorted(DEPLOY.iterdir()) if file.suffix in (".sh", ".sbatch")]
# What the scripts call, as programs that do no more than pass on what they are to run.
STUBS = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "gcloud": 'for w; do [[ "$w" != --command=* ]] || exec bash -c "${w#--command=}"; done',
    "python": 'printf "%s\\n" "$@" >> "$SAID"',
}


def takes(words: list[str]) -> None:
    """Raise UsageError unless the module of `python -m ...` takes the flags."""
    module, *flags = words[words.index("-m") + 1 :]
    if module == "xlinfer.serve":
        assert parse_serve([module, *flags]) is not None
        return
    assert module == "xlinfer.score"
    assert parse_score([module, *flags], ALL) is not None


def test_every_manifest_runs_something():
    assert {name for name, _ in COMMANDS} == {name for name, _ in MANIFESTS}


@pytest.mark.parametrize("name, words", COMMANDS, ids=[name for name, _ in COMMANDS])
def test_commands_are_ones_that_xlinfer_takes(name, words):
    takes(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_scripts_run_what_xlinfer_takes(script, tmp_path):
    said, programs = tmp_path / "said", tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STUBS.items():
        for file in (programs / name, *([programs / "python3"] if name == "python" else [])):
            file.write_text(f"#!/usr/bin/env bash\n{body}\n")
            file.chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin", "HOME": "/home/a user", "SAID": str(said),
        "SLURM_LOCALID": "3",
    }  # fmt: skip
    given = ["pod", "us-east5-a", "gs://bucket/a b/*.jsonl", "gs://bucket/out"]
    subprocess.run(["bash", script, *given], cwd=tmp_path, env=environment, check=True)
    words = said.read_text().splitlines()
    takes(words)
    if script.suffix == ".sh":
        assert "--input=gs://bucket/a b/*.jsonl" in words, "quoted on the way"
