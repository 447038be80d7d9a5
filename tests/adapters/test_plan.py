"""Plans: counts against PEFT's, memory against tensors that are really allocated, the command."""

import json
import re
import sys
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'")

from lorambo_adapters import plan_costs as costs  # noqa: E402  (needs torch)
from lorambo_adapters.calibration import Speeds, measure_speeds  # noqa: E402
from lorambo_adapters.layers import find_layers  # noqa: E402
from lorambo_adapters.plan import plan_extraction  # noqa: E402
from lorambo_adapters.plan_layers import PlannedLayer, planned_model  # noqa: E402
from lorambo_adapters.plan_trace import trace  # noqa: E402
from lorambo_adapters.spectra.block_krylov import largest_basis  # noqa: E402
from lorambo_adapters.spectra.curvature import MomentSums  # noqa: E402
from lorambo_adapters.spectra.decompose import decompose  # noqa: E402
from lorambo_adapters.spectra.sketch_sizes import sketch_numbers  # noqa: E402
from lorambo_adapters.spectra.sketcher import GradientSketcher  # noqa: E402

CPU = torch.device("cpu")
# Every rate is 1, so that seconds are operations.
UNIT = Speeds(**dict.fromkeys(Speeds.__dataclass_fields__, 1.0))
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
SIZES |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is absent")


@pytest.fixture
def peft(transformers):
    return pytest.importorskip("peft", reason="peft is absent: pip install peft")


def small_llama(transformers, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()


def planned(*shapes, dtype=torch.float32):
    return [
        PlannedLayer(f"layers.{i}", shape, dtype, shape[0] * shape[1] * dtype.itemsize)
        for i, shape in enumerate(shapes)
    ]


def written(folder, shapes, dtype=torch.float32):
    save = pytest.importorskip("safetensors.torch", reason="safetensors is absent").save_file
    folder.mkdir(exist_ok=True)
    tensors = {
        f"layers.{i}.up.weight": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)
    }
    save(tensors, folder / "model.safetensors")
    return folder


class TestCounts:
    def test_llama_8b_on_meta(self, peft, transformers, tmp_path):
        """Exact sizes from the config alone, and PEFT's own count of parameters."""
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
        (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
        plan = plan_extraction(tmp_path, rank=16, speeds=UNIT, tokens=256)
        shapes = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
        shapes += [(14336, 4096), (14336, 4096), (4096, 14336)]
        assert len(plan.layers) == 224
        assert [layer.shape for layer in plan.layers] == 32 * shapes
        assert {layer.dtype for layer in plan.layers} == {torch.bfloat16}
        assert plan.weights == 32 * sum(d * k for d, k in shapes)
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # of PEFT with the newest transformers
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
            options = peft.LoraConfig(r=16, target_modules="all-linear")
            adapted = peft.get_peft_model(model, options)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert plan.adapter_parameters == trained
        # float32 weight, gradient and two states; and 4 bytes a token of each input of B.
        assert plan.adapter_bytes == 16 * trained + 224 * 16 * 4 * 256
        assert plan["weights"].read == 2 * plan.weights
        assert plan["delta"].read == 4 * plan.weights

    @pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
    def test_other_families(self, peft, transformers, name):
        if name == "gpt2":
            small = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}
            small |= {"bos_token_id": 0, "eos_token_id": 0}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
        else:
            small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
            small |= {"num_key_value_heads": 2, "vocab_size": 40, "num_experts": 4}
            small |= {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
            config = transformers.Qwen2MoeConfig(**small, num_experts_per_tok=2)
            model = transformers.Qwen2MoeForCausalLM(config)
        plan = plan_extraction(model, rank=4, speeds=UNIT, tokens=64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of Conv1D
            options = peft.LoraConfig(r=4, target_modules="all-linear")
            adapted = peft.get_peft_model(model, options)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert plan.adapter_parameters == trained
        experts = [layer for layer in plan.layers if layer.kind == "expert"]
        assert all(layer.share in (0.5, 1.0) for layer in experts)
        if experts:
            assert {layer.share for layer in experts} >= {0.5}

    def test_a_checkpoint_is_not_read(self, tmp_path, monkeypatch):
        folder = written(tmp_path / "m", [(6, 4), (8, 4)], torch.bfloat16)
        from lorambo_adapters.spectra.tensor_files import TensorFiles

        monkeypatch.setattr(TensorFiles, "read", None)
        plan = plan_extraction(folder, rank=2, speeds=UNIT)
        assert [(layer.name, layer.shape) for layer in plan.layers] == [
            ("layers.0.up", (6, 4)),
            ("layers.1.up", (8, 4)),
        ]
        assert plan["weights"].read == 2 * (24 + 32)
        assert plan.adapter_parameters == 2 * (10 + 12)


class TestMemory:
    @pytest.mark.parametrize("passes", [1, 2, 3, 4])
    def test_sketches_hold_what_is_said(self, passes):
        layers = torch.nn.Sequential(torch.nn.Linear(90, 70), torch.nn.Linear(70, 12))
        width = 8
        sketcher = GradientSketcher(layers, rank=8, width=width, passes=passes)
        for number in range(1, passes + 1):
            for layer in sketcher.layers:
                sketch = sketcher._sketches[layer.name]
                held = [*sketch.accumulators, *sketch.carried]
                test = getattr(sketch, "_test", None)
                if number == passes > 1 and test is not None:
                    held.append(test)
                found = sum(t.numel() for t in held)
                assert found == sketch_numbers(layer.shape, width, passes)[number - 1]
            if number < passes:
                sketcher.next_pass()
        model = planned((70, 90), (12, 70))
        drawn = [*sketcher._gaussians._drawn, *sketcher._gaussians._parts.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in drawn}
        storages.pop(0, None)  # of matrices without columns
        assert costs.gaussian_memory(model, width, passes, CPU) == sum(storages.values())

    @pytest.mark.parametrize("kind", ["input", "kfac"])
    def test_curvature_sums(self, kind):
        module = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20))
        sums = MomentSums(find_layers(module), outputs=kind == "kfac")
        held = sum(t.numel() * 4 for t in (*sums.right.values(), *sums.left.values()))
        data = costs.Data(5, 1)
        batch = data.run(planned((30, 40), (20, 30)), kind != "input").peak
        found = costs.curvature_memory(planned((30, 40), (20, 30)), kind, data)
        # The peak is while summing, or while the last and largest factor is decomposed.
        assert found >= held + batch + 2 * 4 * 40**2
        vectors = 8 * (40**2 + 30**2 + (30**2 + 20**2 if kind == "kfac" else 0))
        assert found <= max(held + batch + 2 * 4 * 40**2, vectors + 48 * 40**2 + held)

    def test_a_trace_counts_what_a_run_holds(self):
        module = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32)
        )
        found = trace(module, find_layers(module), torch.empty(100, 64), CPU)
        assert found.forward.operations == 2 * 100 * (64 * 128 + 128 * 32)
        # The first layer's input needs no gradient.
        assert found.both.operations == 2 * 100 * (64 * 128 + 128 * 32 * 2)
        assert found.tokens == {"0": 100, "2": 100}
        kept = 4 * 100 * (128 + 128)  # the ReLU's input, by its hook, and its output
        assert kept <= found.both.peak <= kept + 4 * 100 * (128 + 2 * 32) + 16
        assert found.forward.peak == 4 * 100 * (128 + 128)

    def test_layers_with_one_input(self, transformers):
        model = small_llama(transformers)
        layers = find_layers(model)
        batch = {"input_ids": torch.zeros(1, 16, dtype=torch.long)}
        found = trace(model, layers, batch, CPU)
        groups = [found.inputs[f"model.layers.0.self_attn.{n}_proj"] for n in "qkvo"]
        assert groups[0] == groups[1] == groups[2] != groups[3]
        assert len(set(found.inputs.values())) == 8  # of 14 layers
        assert set(found.tokens.values()) == {16}
        # The weights were neither run nor written to.
        assert all(p.device.type == "cpu" for p in model.parameters())

    @pytest.mark.parametrize("rank", [8, 16, 32])
    def test_block_krylov_keeps_to_its_largest_basis(self, monkeypatch, rank):
        from lorambo_adapters.spectra import block_krylov as module

        sizes = []
        original = module.orthonormal

        def seen(rows, basis, generator):
            sizes.append(len(rows) + len(basis))
            return original(rows, basis, generator)

        monkeypatch.setattr(module, "orthonormal", seen)
        decompose(torch.randn(300, 400), rank, exact_below=0, tolerance=0.0)
        basis, block = largest_basis(300, rank)
        assert sizes[0] == block
        assert sizes[-1] == basis

    def test_mapped_files(self):
        layers = planned(*[(2048, 2048)] * 8)  # 16 MiB each
        mapped = [size >> 20 for size in costs._mapped(layers)]
        assert mapped == [16, 32, 48, 64, 80, 16, 32, 48]


class TestTime:
    def test_formulas(self):
        layer = planned((40, 30))[0]
        data = costs.Data(tokens=10, batches=3)
        model = 4 * 10 * 1200
        assert costs.gradient_seconds([layer], 4, 1, data, UNIT) == pytest.approx(
            3 * (model + 4 * 10 * 70 * 4) + costs.arithmetic((40, 8), None)
        )
        assert costs.activation_seconds([layer], 4, 2, data, UNIT) == pytest.approx(
            3 * (2 * 10 * 1200 + 2 * 10 * 30**2 + 8 * 10 * 30 * 4) + 30**3
        )
        assert costs.curvature_seconds([layer], "kfac", data, UNIT) == pytest.approx(
            3 * (model + 2 * 10 * (30**2 + 40**2)) + 30**3 + 40**3
        )

    def test_workers_share(self, tmp_path):
        folder = written(tmp_path / "m", [(64, 32)] * 4)
        alone = plan_extraction(folder, speeds=UNIT, batches=8)
        four = plan_extraction(folder, speeds=UNIT, batches=8, workers=4)
        for source in ("weights", "delta"):
            assert four[source].seconds == pytest.approx(alone[source].seconds / 4)
        assert four["curvature diagonal"].seconds == alone["curvature diagonal"].seconds / 4
        assert four["weights"].read == alone["weights"].read

    def test_calibration_gives_rates(self):
        speeds = measure_speeds(planned((64, 48), (16, 200)), tokens=32)
        assert all(getattr(speeds, name) > 0 for name in Speeds.__dataclass_fields__)
        with pytest.raises(ValueError, match="matmul: expected a positive rate, got 0"):
            Speeds(**{**dict.fromkeys(Speeds.__dataclass_fields__, 1.0), "matmul": 0.0})


class TestSources:
    def test_a_module_that_does_not_run_is_planned_by_its_shapes(self):
        model = torch.nn.Sequential(torch.nn.Linear(30, 20))
        plan = plan_extraction(model, speeds=UNIT, batch=torch.empty(4, 7), tokens=4)
        assert any("does not run without data" in note for note in plan.notes)
        assert plan_extraction(model, speeds=UNIT, batch=torch.empty(4, 30)).notes == ()

    def test_refusals(self, tmp_path, transformers):
        broken = tmp_path / "config.json"
        for text, part in [
            ('{"model_type": "nothing"}', "that transformers knows"),
            ("{}", "that transformers knows"),
            ("no", "that transformers knows"),
            ('{"model_type": "llama", "hidden_size": "x"}', "expected a config"),
        ]:
            broken.write_text(text)
            with pytest.raises(ValueError, match=part):
                planned_model(broken)
        with pytest.raises(FileNotFoundError):
            planned_model(tmp_path / "absent")
        for option in ("rank", "tokens", "batches", "passes", "width", "workers", "values"):
            given: dict[str, Any] = {option: 0}
            with pytest.raises(ValueError, match=f"{option}: expected a whole number"):
                plan_extraction(torch.nn.Linear(3, 2), **given)

    def test_code_in_the_folder_is_not_run_and_nobody_is_asked(
        self, tmp_path, transformers, monkeypatch
    ):
        asked = []
        monkeypatch.setattr("builtins.input", lambda *said: asked.append(said) or "n")
        text = '{"model_type": "xx", "auto_map": {"AutoConfig": "configuration_x.X"}}'
        (tmp_path / "config.json").write_text(text)
        (tmp_path / "configuration_x.py").write_text("raise SystemExit('it was run')")
        with pytest.raises(ValueError, match="that transformers knows"):
            planned_model(tmp_path)
        assert not asked

    def test_architectures_that_are_no_names(self, tmp_path, transformers):
        small_llama(transformers).config.save_pretrained(tmp_path)
        usual = planned_model(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [3]}))
        assert planned_model(tmp_path).layers == usual.layers

    def test_what_is_not_counted_is_said(self, tmp_path, transformers):
        small_llama(transformers).config.save_pretrained(tmp_path)
        assert plan_extraction(tmp_path, speeds=UNIT, tokens=8).notes == ()
        path = tmp_path / "config.json"
        more = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
        (note,) = plan_extraction(tmp_path, speeds=UNIT, tokens=8).notes
        assert note.startswith("the config's quantization is not counted")

    def test_experts_of_a_checkpoint(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"m.experts.up_proj": torch.ones(3, 8, 6)}, tmp_path / "model.safetensors")
        plan = plan_extraction(tmp_path, speeds=UNIT, tokens=8)
        assert any(note.startswith("how many of the experts") for note in plan.notes)

    def test_what_fails_without_data_is_not_logged(self, caplog):
        model = torch.nn.Sequential(torch.nn.Linear(30, 20))
        plan_extraction(model, speeds=UNIT, batch=torch.empty(4, 7), tokens=4)
        assert caplog.records == []


class TestCommand:
    def test_prints_the_plan(self, capsys, tmp_path):
        pytest.importorskip("typer", reason="typer is absent")
        from lorambo_adapters.cli import main

        folder = written(tmp_path / "m", [(64, 32)] * 3)
        assert main(["plan", str(folder), "--rank", "4", "--tokens", "64", "--workers", "2"]) == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert said.out.startswith("m: 3 layers, 6,144 weights, 24 KiB (float32)\n")
        assert re.search(r"layers\.\*\.up +64 x 32 +3 +6,144 +1,152\n", said.out)
        assert "LoRA of rank 4: 1,152 parameters" in said.out
        assert max(map(len, said.out.splitlines())) <= 80

    def test_refusals(self, capsys, tmp_path, monkeypatch):
        pytest.importorskip("typer", reason="typer is absent")
        from lorambo_adapters.cli import main

        folder = written(tmp_path / "m", [(64, 32)])
        for arguments, part in [
            ([str(tmp_path / "no")], "no: No such file or directory"),
            ([str(folder), "--device", "nothing"], "device 'nothing' cannot be used"),
            ([str(folder), "--values", "few"], "expected a whole number from 1 on, or all"),
            ([str(folder), "--targets", "q_proj"], "targets=['q_proj'], got none"),
            ([str(folder), "--workers", "0"], "--workers"),
        ]:
            assert main(["plan", *arguments]) == 2, arguments
            said = capsys.readouterr()
            assert said.out == ""
            assert said.err.count("\n") == 1
            assert part in said.err
        for name in [n for n in sys.modules if n.startswith("lorambo_adapters.")]:
            if "command" not in name and "refusals" not in name:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torch", None)
        assert main(["plan", str(folder)]) == 2
        assert capsys.readouterr().err.endswith("pip install 'lorambo-alloc[torch]'\n")
