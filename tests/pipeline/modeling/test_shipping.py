"""An exported folder loads in a process that has transformers and nothing of this project, with the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hedgehog.pipeline.modeling.architecture import architecture
from hedgehog.pipeline.modeling.convert import convert_base
from hedgehog.pipeline.modeling.shipping import _check_imports, modeling_sources, ship_modeling_files

# `hedgehog` and this project's folders cannot be imported in the child, whatever is installed beside transformers.
CLEAN_PROCESS = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hedgehog":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
inputs = load_file("inputs.safetensors")
for folder in map(Path, ("export_float32", "export_bfloat16")):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=config.dtype).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert not any(name == "hedgehog" or name.startswith("hedgehog.") for name in sys.modules)
    with torch.no_grad():
        logits = model(**inputs).logits
        decoder = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=config.dtype).eval()
        assert torch.equal(decoder(**inputs).last_hidden_state, model.base_model(**inputs).last_hidden_state)
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **{config.dropout_field: 0.1})
        raise AssertionError("linear attention has nothing to drop")
    except ValueError as error:
        assert f"{config.dropout_field} is 0.1" in str(error)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    beams = model.generate(**inputs, do_sample=False, max_new_tokens=8, num_beams=2).contiguous()
    dtypes = {str(p.dtype) for n, p in model.named_parameters() if "feature_map" in n}
    assert dtypes == {"torch.float32"}, dtypes
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert fresh.config.feature_map == config.feature_map == "hedgehog_exp"
    save_file({"logits": logits, "tokens": tokens, "beams": beams}, folder / "outputs.safetensors")
"""


def test_clean_process_gives_the_same_numbers(new_base, token_ids, left_padded, tmp_path):
    ids_BL, mask_BL = left_padded([token_ids(1, 6)[0], token_ids(1, 15)[0]])
    inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
    save_file(inputs, tmp_path / "inputs.safetensors")
    models = {}
    for name, dtype in (("export_float32", torch.float32), ("export_bfloat16", torch.bfloat16)):
        model = convert_base(new_base().to(dtype), feature_map="hedgehog_exp", feature_dim=24, chunk_size=8)
        generator = torch.Generator().manual_seed(2)
        for parameter_name, parameter in model.named_parameters():
            if "feature_map" in parameter_name:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
        written = ship_modeling_files(tmp_path / name)
        assert all((tmp_path / name / file).is_file() for file in written)
        models[name] = model
    script = tmp_path / "clean.py"
    script.write_text(CLEAN_PROCESS)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-I", str(script)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for name, model in models.items():
        outputs = load_file(tmp_path / name / "outputs.safetensors")
        with torch.no_grad():
            assert torch.equal(outputs["logits"], model(**inputs).logits)
        assert torch.equal(outputs["tokens"], model.generate(**inputs, do_sample=False, max_new_tokens=8))
        assert torch.equal(outputs["beams"], model.generate(**inputs, do_sample=False, max_new_tokens=8, num_beams=2))


def test_auto_map_is_entered_and_the_rest_of_the_config_kept(base, family, tmp_path):
    auto_map = architecture(family).auto_map
    convert_base(base).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    written = ship_modeling_files(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == {**before, "auto_map": auto_map}
    own = {f"modeling_hedgehog_{family}.py", f"configuration_hedgehog_{family}.py"}
    assert own | {"hedgehog_decoder.py", "feature_maps.py", "config.json"} <= set(written)
    others = {"llama", "gpt2"} - {family}
    assert not any(other in name for name in written for other in others), "only this family's files travel"
    for value in auto_map.values():
        module, class_name = value.split(".")
        assert f"class {class_name}(" in (tmp_path / f"{module}.py").read_text()
    assert ship_modeling_files(tmp_path) == written  # a second time changes nothing
    assert json.loads((tmp_path / "config.json").read_text()) == after


def test_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ship_modeling_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_import_of_this_project_is_left(family):
    for name, source in modeling_sources(architecture(family)).items():
        for line in source.splitlines():
            if line.lstrip().startswith(("import ", "from ")) and " import" in f" {line}":
                assert "hedgehog." not in line and "from .." not in line, f"{name}: {line}"


@pytest.mark.parametrize(
    "line",
    [
        "import hedgehog.kernels",
        "from hedgehog.kernels.feature_maps import FeatureMap",
        "from ..errors import ModelError",
        "from . import feature_maps",
        "from .unknown import x",
        "def late():\n    import peft",
    ],
)
def test_an_import_that_would_fail_is_found(line):
    with pytest.raises(ValueError, match="would fail in an exported folder"):
        _check_imports("file.py", line, known={"feature_maps"})


BESIDE_PYPI_KERNELS = """
import kernels, torch, transformers
assert kernels.__version__ == "0.99.0" and "site" in kernels.__file__
from transformers import LlamaConfig, LlamaForCausalLM
from hedgehog.pipeline.modeling.convert import convert_base
import hedgehog.kernels.feature_maps
assert hedgehog.kernels.__name__ == "hedgehog.kernels" and not hasattr(hedgehog.kernels, "__version__")
fields = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = convert_base(LlamaForCausalLM(LlamaConfig(**fields)).eval())
model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3)
print("works")
"""


def test_transformers_runs_beside_the_pypi_package_kernels(tmp_path):
    """A distribution called `kernels` is probed by transformers at import; ours is only ever `hedgehog.kernels`."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text('__version__ = "0.99.0"\n')
    (site / "kernels-0.99.0.dist-info").mkdir()
    (site / "kernels-0.99.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n"
    )
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n{BESIDE_PYPI_KERNELS}"
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and ran.stdout.strip().endswith("works"), ran.stderr[-3000:]
