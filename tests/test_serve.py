"""The server's classes: what `transformers serve` looks up by the name in a config."""

import subprocess
import sys

# In a process of its own: it changes what `transformers` holds. The server imports the package before our module does.
LOOKUP = """
import transformers
from modeling_deepseek.serve import put_in_place

native = transformers.DeepseekV3ForCausalLM
put_in_place()
for name in ("DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
    found = getattr(sys.modules["transformers"], name)
    assert found.__module__ == "modeling_deepseek.modeling_deepseek", found
    assert transformers.AutoModelForCausalLM._model_mapping[found.config_class] is found
assert native.__module__.startswith("transformers.")
"""


def test_the_server_finds_the_classes_of_this_package():
    subprocess.run([sys.executable, "-c", f"import sys\n{LOOKUP}"], check=True, timeout=120)


def test_the_command_is_that_of_transformers():
    """Without the server's own packages it names them, as `transformers serve` does."""
    command = [sys.executable, "-m", "modeling_deepseek.serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "--continuous-batching" in shown.stdout
