"""Our models travel through a Hub: pushed by one process, loaded by another that does not have the package."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_relative_import_files

from hub_server import Blob, HubServer, Reply, Repo

PROJECT = Path(__file__).resolve().parents[1]
MIB = 2**20
RESULT = "findings.safetensors"

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

# The client reads its endpoint at import, so each client is a process. What it found out, it leaves in argv[1]:
# logits as tensors, everything else as metadata.
COMMON = """
import json, sys, torch
from safetensors.torch import save_file

def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12)).logits
"""

WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_deepseek":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

PUSH = """
from modeling_deepseek import DeepseekV3Config, DeepseekV3ForCausalLM

config = DeepseekV3Config(**json.loads(sys.argv[2]))
torch.manual_seed(0)
old, new = DeepseekV3ForCausalLM(config), DeepseekV3ForCausalLM(config)
pushed = {name: model.push_to_hub("user/tiny").oid for name, model in (("old", old), ("again", old), ("new", new))}
save_file({"old": logits(old), "new": logits(new)}, sys.argv[1], pushed)
"""

LOAD = """
from transformers import AutoModelForCausalLM

models = {
    name: AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True, revision=revision)
    for name, revision in json.loads(sys.argv[3]).items()
}
modules = {name: type(model).__module__ for name, model in models.items()}
save_file({name: logits(model) for name, model in models.items()}, sys.argv[1], modules)
"""

PUSH_LOADED = """
models["new"].push_to_hub("user/forwarded", max_shard_size="50KB")
"""

REFUSED = """
import time
from transformers import AutoModelForCausalLM

def refusal(repo_id, revision):
    start = time.monotonic()
    try:
        AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True, revision=revision)
    except OSError as error:
        seconds = time.monotonic() - start
        return json.dumps({"message": str(error), "cause": type(error.__cause__).__name__, "seconds": seconds})

answers = {"repo": refusal("user/absent", None), "revision": refusal("user/tiny", "absent")}
save_file({}, sys.argv[1], answers)
"""

DOWNLOAD = """
import sys
from huggingface_hub import hf_hub_download

print(hf_hub_download("user/weights", "model.safetensors"))
"""

EDIT = """
import json
from huggingface_hub import CommitOperationDelete, HfApi

api = HfApi()
api.create_repo("user/files")
api.upload_file(path_or_fileobj=b"a tokenizer", path_in_repo="extra/vocab.txt", repo_id="user/files")
api.upload_file(path_or_fileobj=b"some weights", path_in_repo="extra/model.bin", repo_id="user/files")
api.create_branch("user/files", branch="without/extra")
api.create_commit("user/files", [CommitOperationDelete("extra/")], commit_message="less", revision="without/extra")
listed = api.get_paths_info("user/files", ["extra", "extra/model.bin"])
print(json.dumps({
    "user": api.whoami()["name"],
    "main": api.list_repo_files("user/files"),
    "branch": api.list_repo_files("user/files", revision="without/extra"),
    "root": [entry.path for entry in api.list_repo_tree("user/files")],
    "sizes": {entry.path: getattr(entry, "size", None) for entry in listed},
}))
"""


@dataclass
class Findings:
    """What a client process left behind."""

    home: Path  # its HF_HOME
    tensors: dict[str, torch.Tensor]
    facts: dict[str, str]


def run(hub: HubServer, home: Path, script: str, *args: str, packages: str = "") -> subprocess.CompletedProcess:
    """Runs `script` as a client of `hub` in the folder `home`, with `packages` beside what is installed."""
    command = [sys.executable, "-P", "-c", script, *args]
    environment = hub.environment(home) | {"PYTHONPATH": packages}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)


def find_out(hub: HubServer, home: Path, script: str, *args: str, packages: str = "") -> Findings:
    result = home / RESULT
    done = run(hub, home, script, str(result), *args, packages=packages)
    assert done.returncode == 0, done.stderr
    with safe_open(result, "pt") as file:
        return Findings(home, load_file(result), file.metadata())


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
    assert [exchange for exchange in server.hub.log + server.storage.log if exchange.status == 501] == []


@pytest.fixture(scope="module")
def pushed(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """user/tiny: a model pushed twice, then one with other weights; logits of both, and the three commits."""
    home = tmp_path_factory.mktemp("pusher")
    return find_out(hub, home, COMMON + PUSH, json.dumps(TINY), packages=str(PROJECT))


@pytest.fixture(scope="module")
def loaded(hub: HubServer, pushed: Findings, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """user/tiny at main and at its first commit, loaded without the package; then main pushed to user/forwarded."""
    revisions = {"new": "main", "old": pushed.facts["old"]}
    script = WITHOUT_PACKAGE + COMMON + LOAD + PUSH_LOADED
    return find_out(hub, tmp_path_factory.mktemp("loader"), script, "user/tiny", json.dumps(revisions))


@pytest.fixture(scope="module")
def forwarded(hub: HubServer, loaded: Findings, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """user/forwarded, loaded without the package by a process that never saw user/tiny."""
    script = WITHOUT_PACKAGE + COMMON + LOAD
    return find_out(hub, tmp_path_factory.mktemp("second"), script, "user/forwarded", json.dumps({"new": "main"}))


@pytest.fixture(scope="module")
def refused(hub: HubServer, pushed: Findings, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What a client is told of a repository and of a revision that do not exist."""
    return find_out(hub, tmp_path_factory.mktemp("refused"), COMMON + REFUSED)


@pytest.fixture
def weights(hub: HubServer) -> Blob:
    """The one large file of user/weights; larger than the 10 MiB that the client holds back before it writes."""
    blob = Blob(random.Random(0).randbytes(12 * MIB), is_lfs=True)
    hub.repos["user/weights"] = Repo()
    hub.repos["user/weights"].commit("main", "weights", {"model.safetensors": blob})
    return blob


def shipped_code() -> set[str]:
    """Names of the files that a model needs, as transformers finds them."""
    entry = PROJECT / "modeling_deepseek" / "modeling_deepseek.py"
    return {entry.name, *(Path(path).name for path in get_relative_import_files(entry))}


def code_of(files: dict[str, Blob]) -> dict[str, bytes]:
    return {path: blob.data for path, blob in files.items() if path.endswith(".py")}


def test_push_uploads_weights_configs_card_and_code(hub: HubServer, pushed: Findings):
    files = hub.repos["user/tiny"].resolve("main").files
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= files.keys()
    assert files["model.safetensors"].is_lfs
    assert code_of(files) == {name: (PROJECT / "modeling_deepseek" / name).read_bytes() for name in shipped_code()}


def test_pushed_config_names_the_code(hub: HubServer, pushed: Findings):
    config = json.loads(hub.repos["user/tiny"].resolve("main").files["config.json"].data)
    assert config["auto_map"]["AutoConfig"] == "configuration_deepseek.DeepseekV3Config"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_deepseek.DeepseekV3ForCausalLM"


def test_loads_without_the_package_and_gives_the_same_logits(pushed: Findings, loaded: Findings):
    assert loaded.facts["new"].startswith("transformers_modules.user.tiny.")
    assert torch.equal(loaded.tensors["new"], pushed.tensors["new"])


def test_old_commit_keeps_its_logits_after_a_reupload(pushed: Findings, loaded: Findings):
    assert torch.equal(loaded.tensors["old"], pushed.tensors["old"])
    assert not torch.equal(pushed.tensors["old"], pushed.tensors["new"])


def test_pushing_an_unchanged_model_makes_no_commit_and_no_upload(hub: HubServer, pushed: Findings):
    uploads = [exchange for exchange in hub.storage.log if exchange.path.startswith("/user/tiny/")]
    weights = {commit.files["model.safetensors"].sha256 for commit in list(hub.repos["user/tiny"].commits.values())[1:]}
    assert pushed.facts["again"] == pushed.facts["old"] != pushed.facts["new"]
    assert sorted(exchange.path for exchange in uploads if exchange.method == "PUT") == sorted(
        f"/user/tiny/{sha256}" for sha256 in weights
    )


@pytest.mark.parametrize(
    ("asked", "cause", "named"),
    [("repo", "RepositoryNotFoundError", "user/absent"), ("revision", "RevisionNotFoundError", "absent")],
)
def test_what_does_not_exist_is_refused_by_name_within_seconds(refused: Findings, asked: str, cause: str, named: str):
    answer = json.loads(refused.facts[asked])
    assert answer["cause"] == cause
    assert answer["message"].startswith(f"{named} is not a ")
    assert answer["seconds"] < 10


def test_a_refusal_leaves_nothing_in_the_cache(refused: Findings):
    assert [path.name for path in refused.home.rglob("*") if path.is_file()] == [RESULT]


def test_remote_code_model_pushes_itself_and_loads_again(hub: HubServer, pushed: Findings, forwarded: Findings):
    first, second = (hub.repos[repo_id].resolve("main").files for repo_id in ("user/tiny", "user/forwarded"))
    assert second["config.json"] == first["config.json"]
    assert code_of(second) == code_of(first)
    assert "model.safetensors.index.json" in second
    assert forwarded.facts["new"].startswith("transformers_modules.user.forwarded.")
    assert torch.equal(forwarded.tensors["new"], pushed.tensors["new"])


def test_truncated_download_is_an_error_and_leaves_no_file(
    hub: HubServer, weights: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub.storage, "damage", lambda reply: replace(reply, body=reply.body[: 11 * MIB]))
    done = run(hub, tmp_path, DOWNLOAD)
    assert done.returncode == 1
    assert f"should be of size {len(weights.data)} but has size {11 * MIB}" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.name in (weights.sha256, "model.safetensors")] == []


def test_dropped_download_is_resumed_where_it_broke(
    hub: HubServer, weights: Blob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replies: list[Reply] = []

    def drop_first(reply: Reply) -> Reply:
        replies.append(reply)
        return replace(reply, sent=11 * MIB) if len(replies) == 1 else reply

    monkeypatch.setattr(hub.storage, "damage", drop_first)
    done = run(hub, tmp_path, DOWNLOAD)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == weights.data
    assert [reply.status for reply in replies] == [200, 206]


def test_hub_server_shows_the_client_folders_branches_and_deletions(hub: HubServer, tmp_path: Path):
    done = run(hub, tmp_path, EDIT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "user": "user",
        "main": [".gitattributes", "extra/model.bin", "extra/vocab.txt"],
        "branch": [".gitattributes"],
        "root": ["extra", ".gitattributes"],
        "sizes": {"extra": None, "extra/model.bin": 12},
    }
