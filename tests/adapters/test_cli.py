"""The `lorambo` command: through typer's runner, through `main`, and in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer", reason="typer is absent: pip install 'lorambo-alloc[cli]'")
pytest.importorskip("rich", reason="rich is absent: pip install 'lorambo-alloc[cli]'")

from typer.testing import CliRunner

from lorambo_adapters import commands
from lorambo_adapters.arguments import budget_from, objective_from
from lorambo_adapters.cli import main
from lorambo_adapters.commands import app
from lorambo_alloc import Allocation, Certificate, Spectra, allocate, log, schatten, uniform_rank

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "all-MiniLM-L6-v2.npz"


@pytest.fixture
def spectra_file(tmp_path):
    """Two layers; a rank costs 20 parameters in the first and 10 in the second."""
    values = {"big": [4.0, 2.0, 1.0], "small": [3.0, 1.0]}
    spectra = Spectra(
        values, shapes={"big": (12, 8), "small": (6, 4)}, source="by hand", unresolved={"big": 0.5}
    )
    path = tmp_path / "two.npz"
    spectra.save(path)
    return path


def refusal(capsys, *arguments) -> str:
    """Run `lorambo`, expect it to refuse, and return the one line it says."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("lorambo: ")
    return err


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "budget"),
        [
            ("0", 0),
            ("331776", 331776),
            (" 12 ", 12),
            ("1.5M", 1_500_000),
            ("1.5m", 1_500_000),
            ("2k", 2000),
            ("0.25K", 250),
            ("7B", 7 * 10**9),
            ("1.25G", 1_250_000_000),
            ("0.1k", 100),  # exact, though 0.1 is no double
            ("9007199254740993", 2**53 + 1),
            ("1.0", 1),
        ],
    )
    def test_numbers(self, text, budget):
        assert budget_from(text) == budget

    def test_uniform(self):
        assert budget_from("uniform:8") == uniform_rank(8)

    @pytest.mark.parametrize(
        "text",
        ["", "-5", "1e6", "many", "M", "1.5T", "1,000", "uniform:", "uniform:-1", "uniform:1.5",
         "uniform", "nan", "0x10", "1.", ".5M", "٣", "9" * 5000],
    )  # fmt: skip
    def test_what_is_no_budget(self, text):
        with pytest.raises(ValueError, match=r"^budget .*expected a whole number such as"):
            budget_from(text)

    @pytest.mark.parametrize("text", ["1.5", "0.0001k", "1.2345678M"])
    def test_a_fraction_of_a_parameter(self, text):
        with pytest.raises(ValueError, match="whole number of parameters"):
            budget_from(text)


class TestObjective:
    def test_names_and_parameters(self):
        assert [objective_from(name) for name in ("frobenius", "nuclear", "operator")] == [
            "frobenius",
            "nuclear",
            "operator",
        ]
        assert objective_from("schatten:1.5") == schatten(1.5)
        assert objective_from("log:1e-2") == log(0.01)

    @pytest.mark.parametrize("text", ["", "entropy", "schatten", "log", "nuclear:1", ":2"])
    def test_unknown(self, text):
        with pytest.raises(ValueError, match=r"expected frobenius, nuclear, operator, schatten:P"):
            objective_from(text)

    @pytest.mark.parametrize("text", ["schatten:", "schatten:two", "log:?"])
    def test_no_number(self, text):
        with pytest.raises(ValueError, match="expected a number after"):
            objective_from(text)

    @pytest.mark.parametrize("text", ["schatten:0", "schatten:-1", "log:nan", "log:0"])
    def test_a_number_out_of_range(self, text):
        with pytest.raises(ValueError, match="expected a finite"):
            objective_from(text)


class TestAllocate:
    def test_prints_the_allocation(self, spectra_file):
        result = CliRunner().invoke(app, ["allocate", str(spectra_file), "--budget", "30"])
        assert result.exit_code == 0, result.output
        assert result.stdout == repr(allocate(Spectra.load(spectra_file), 30)) + "\n"

    def test_options_reach_the_library(self, spectra_file, tmp_path):
        out = tmp_path / "out.json"
        common = ["allocate", str(spectra_file), "--json", str(out), "--budget"]
        for options, keywords in [
            (["uniform:1"], {"budget": uniform_rank(1)}),
            (["0.04k", "--max-rank", "1"], {"budget": 40, "max_rank": 1}),
            (["40", "--min-rank", "1"], {"budget": 40, "min_rank": 1}),
            (["50", "--multiple-of", "2"], {"budget": 50, "multiple_of": 2}),
            (["30", "--objective", "nuclear"], {"budget": 30, "objective": "nuclear"}),
            (["30", "--objective", "operator"], {"budget": 30, "objective": "operator"}),
            (["30", "--objective", "schatten:3"], {"budget": 30, "objective": schatten(3)}),
            (["30", "--objective", "log:0.5"], {"budget": 30, "objective": log(0.5)}),
        ]:
            result = CliRunner().invoke(app, common + options)
            assert result.exit_code == 0, result.output
            expected = allocate(Spectra.load(spectra_file), **keywords)
            written = json.loads(out.read_text(encoding="utf-8"))
            assert written["ranks"] == dict(expected), options
            assert written["cost"] == expected.cost <= written["budget"] == expected.budget

    def test_json_holds_the_certificate(self, spectra_file, tmp_path):
        out = tmp_path / "out.json"
        out.write_text("an older file")
        assert main(["allocate", str(spectra_file), "--budget", "30", "--json", str(out)]) == 0
        written = json.loads(out.read_text(encoding="utf-8"))
        assert written["spectra"] == str(spectra_file)
        assert written["objective"] == "frobenius"
        # 16 + 9 of 16 + 9 + 4 + 1 + 1: one rank each costs 30.
        assert written["ranks"] == {"big": 1, "small": 1}
        assert written["value"] == 25.0
        assert written["captured"] == pytest.approx(25 / 31)
        certificate = written["certificate"]
        assert certificate["status"] == "optimal_exact"
        assert certificate["upper_bound"] >= certificate["value"] == 25.0
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_json_of_a_search_that_stopped_at_nothing(self, spectra_file, tmp_path, monkeypatch):
        def stopped(problem):
            certificate = Certificate("gap_certified", 0.0, 5.0, 5.0, 0.5, "a stand-in")
            return Allocation(problem, problem.lower, certificate)

        monkeypatch.setattr(commands, "solve", stopped)
        out = tmp_path / "out.json"
        assert main(["allocate", str(spectra_file), "--budget", "30", "--json", str(out)]) == 0
        certificate = json.loads(out.read_text(encoding="utf-8"))["certificate"]
        assert certificate["relative_gap"] is None
        assert certificate["gap"] == 5.0

    def test_a_defect_keeps_its_traceback(self, spectra_file, monkeypatch):
        def broken(problem):
            raise ValueError("a defect")

        monkeypatch.setattr(commands, "solve", broken)
        with pytest.raises(ValueError, match="a defect"):
            main(["allocate", str(spectra_file), "--budget", "30"])

    def test_an_interrupt_is_no_traceback(self, spectra_file, monkeypatch):
        def interrupted(problem):
            raise KeyboardInterrupt

        monkeypatch.setattr(commands, "solve", interrupted)
        assert main(["allocate", str(spectra_file), "--budget", "30"]) == 130

    def test_the_shipped_example(self, capsys):
        assert main(["allocate", str(EXAMPLE), "--budget", "uniform:8"]) == 0
        out = capsys.readouterr().out
        assert "encoder.layer.0.attention.self.query" in out
        assert "331,776" in out.replace("331776", "331,776")


class TestInfo:
    def test_shows_every_layer(self, spectra_file):
        result = CliRunner().invoke(app, ["info", str(spectra_file)])
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert ["big", "12", "x", "8", "3", "4", "21", "0.5"] in [line.split() for line in lines]
        assert ["small", "6", "x", "4", "2", "3", "10", "0"] in [line.split() for line in lines]
        assert "2 layers, energy (sum of squared values) 31" in lines
        assert "source: by hand" in lines

    def test_without_shapes_or_source(self, tmp_path):
        path = tmp_path / "bare.npz"
        Spectra({"[red]q[/red]": [2.0]}).save(path)
        result = CliRunner().invoke(app, ["info", str(path)])
        assert result.exit_code == 0, result.output
        assert ["[red]q[/red]", "-", "1", "2", "4", "0"] in [
            line.split() for line in result.stdout.splitlines()
        ]
        assert "source: not recorded" in result.stdout


class TestRefusals:
    def test_missing_file(self, capsys, tmp_path):
        for command in (["allocate", "--budget", "9"], ["info"]):
            said = refusal(capsys, *command, tmp_path / "no.npz")
            assert "no.npz: No such file or directory" in said
        assert "two lines.npz" in refusal(capsys, "info", tmp_path / "two\nlines.npz")

    def test_files_that_are_no_spectra(self, capsys, tmp_path, spectra_file):
        text = tmp_path / "text.npz"
        text.write_text("not a zip")
        empty = tmp_path / "empty.npz"
        empty.write_bytes(b"")
        cut = tmp_path / "cut.npz"
        cut.write_bytes(spectra_file.read_bytes()[:-40])
        flipped = tmp_path / "flipped.npz"
        damaged = bytearray(spectra_file.read_bytes())
        damaged[len(damaged) // 3] ^= 0xFF
        flipped.write_bytes(damaged)
        array = tmp_path / "array.npy"
        np.save(array, np.ones(3))
        other = tmp_path / "other.npz"
        np.savez(other, a=np.ones(3))
        for path in (text, empty, cut, flipped, array, other, tmp_path):
            assert path.name in refusal(capsys, "info", path)

    def test_pickled_objects_are_not_loaded(self, capsys, tmp_path):
        path = tmp_path / "pickle.npz"
        np.savez(path, header=np.array([{"a": 1}], dtype=object))
        assert "pickle.npz" in refusal(capsys, "info", path)

    def test_a_newer_file(self, capsys, tmp_path, spectra_file):
        with np.load(spectra_file) as data:
            arrays = {name: data[name] for name in data.files}
        header = json.loads(str(arrays["header"]))
        header["version"] = 999
        arrays["header"] = np.array(json.dumps(header))
        path = tmp_path / "newer.npz"
        np.savez(path, **arrays)
        said = refusal(capsys, "allocate", path, "--budget", "9")
        assert "newer.npz" in said
        assert "999" in said

    def test_infeasible_budget_says_the_smallest(self, capsys, spectra_file):
        said = refusal(capsys, "allocate", spectra_file, "--budget", "29", "--min-rank", "1")
        assert "30" in said

    @pytest.mark.parametrize("budget", ["-5", "1.5", "lots", "uniform:x"])
    def test_bad_budget(self, capsys, spectra_file, budget):
        assert "budget" in refusal(capsys, "allocate", spectra_file, "--budget", budget)

    def test_bad_objective(self, capsys, spectra_file):
        said = refusal(capsys, "allocate", spectra_file, "--budget", "9", "--objective", "best")
        assert "expected frobenius" in said

    @pytest.mark.parametrize(
        "options", [["--multiple-of", "0"], ["--max-rank", "-1"], ["--min-rank", "-1"]]
    )
    def test_bad_limits(self, capsys, spectra_file, options):
        said = refusal(capsys, "allocate", spectra_file, "--budget", "30", *options)
        assert options[0].strip("-").replace("-", "_") in said

    def test_usage(self, capsys, spectra_file):
        assert "--budget" in refusal(capsys, "allocate", spectra_file)
        assert "FILE" in refusal(capsys, "info")
        assert "lorambo --help" in refusal(capsys)
        assert "solve" in refusal(capsys, "solve", spectra_file)
        assert "--colour" in refusal(capsys, "info", spectra_file, "--colour")
        few = ("--budget", "9", "--max-rank", "few")
        assert "--max-rank" in refusal(capsys, "allocate", spectra_file, *few)

    def test_json_that_cannot_be_written(self, capsys, spectra_file, tmp_path):
        nowhere = tmp_path / "no" / "out.json"
        said = refusal(capsys, "allocate", spectra_file, "--budget", "30", "--json", nowhere)
        assert "out.json: No such file or directory" in said
        folder = tmp_path / "folder.json"
        folder.mkdir()
        refusal(capsys, "allocate", spectra_file, "--budget", "30", "--json", folder)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_json_that_fails_half_way_leaves_the_older_file(
        self, capsys, spectra_file, tmp_path, monkeypatch
    ):
        def full(source, target):
            raise OSError(28, "No space left on device")

        out = tmp_path / "out.json"
        out.write_text("an older file")
        monkeypatch.setattr("os.replace", full)
        said = refusal(capsys, "allocate", spectra_file, "--budget", "30", "--json", out)
        assert "out.json: No space left on device" in said
        assert out.read_text() == "an older file"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    @pytest.mark.parametrize("absent", ["typer", "rich"])
    def test_without_the_extra(self, capsys, monkeypatch, spectra_file, absent):
        monkeypatch.delitem(sys.modules, "lorambo_adapters.commands")
        for name in [name for name in sys.modules if name.partition(".")[0] == absent]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, absent, None)  # what the import system reads as absent
        said = refusal(capsys, "info", spectra_file)
        assert said.endswith("pip install 'lorambo-alloc[cli]'\n")


class TestProcess:
    def run(self, *arguments, **options):
        code = "import sys; from lorambo_adapters.cli import main; sys.exit(main())"
        path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},  # empty: buffered
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            **options,
        )

    def test_help(self):
        done = self.run("--help", stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, "")
        assert "allocate" in done.stdout
        assert "info" in done.stdout

    def test_an_answer(self, spectra_file):
        done = self.run("allocate", spectra_file, "--budget", 30, stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, "")
        assert "big" in done.stdout

    def test_an_error_is_one_line_and_exit_code_2(self, tmp_path):
        done = self.run("info", tmp_path / "no.npz", stdout=subprocess.PIPE)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1

    @pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
    @pytest.mark.parametrize("command", [["info"], ["allocate", "--budget", "30"]])
    def test_a_reader_that_leaves_is_no_traceback(self, spectra_file, command):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = self.run(*command, spectra_file, stdout=writing)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")


class TestSpectra:
    @pytest.fixture
    def models(self, tmp_path):
        torch = pytest.importorskip("torch", reason="torch is absent")
        pytest.importorskip("safetensors", reason="safetensors is absent")
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        folders = []
        for which in ("base", "tuned"):
            folder = tmp_path / which
            folder.mkdir()
            tensors = {
                f"layers.{i}.{name}.weight": torch.randn(8, 6, generator=generator)
                for i in range(2)
                for name in ("q_proj", "up_proj")
            }
            tensors["embed_tokens.weight"] = torch.randn(30, 6, generator=generator)
            save_file(tensors, folder / "model.safetensors")
            folders.append(folder)
        return folders

    def test_weights(self, capsys, models, tmp_path):
        from lorambo_adapters.spectra.checkpoints import checkpoint_spectra

        out = tmp_path / "s.npz"
        for options, keywords in [
            ([], {}),
            (["--rank", "2"], {"rank": 2}),
            (["--rank", "all"], {"rank": None}),
            (["--targets", "q_proj"], {"targets": ["q_proj"]}),
            (["--targets", "q_proj, embed_tokens"], {"targets": ["q_proj", "embed_tokens"]}),
            (["--targets", r"layers\.0\..*"], {"targets": r"layers\.0\..*"}),
            (["--exclude", "layers.0.q_proj"], {"exclude": ["layers.0.q_proj"]}),
            (["--seed", "3", "--device", "cpu"], {"seed": 3}),
        ]:
            assert main(["spectra", "weights", str(models[0]), "-o", str(out), *options]) == 0
            expected, written = checkpoint_spectra(models[0], **keywords), Spectra.load(out)
            assert written.source == expected.source
            assert list(written) == list(expected)
            assert all(np.array_equal(written[name], expected[name]) for name in expected)
            said = capsys.readouterr()
            assert said.err == ""
            assert said.out.startswith(f"{out}: Spectra({len(expected)} layers, ")

    def test_delta_then_allocate(self, capsys, models, tmp_path):
        out = tmp_path / "s.npz"
        arguments = ["spectra", "delta", *map(str, models), "-o", str(out), "--rank", "3"]
        assert main(arguments) == 0
        assert "% of the energy\n" in capsys.readouterr().out
        assert Spectra.load(out).source.startswith("tuned less base; at most 3 singular values")
        assert main(["allocate", str(out), "--budget", "uniform:2"]) == 0
        arguments[3] = arguments[2]
        assert main(arguments) == 0
        assert capsys.readouterr().out.endswith(", all zero\n")

    def test_refusals(self, capsys, models, tmp_path):
        base, tuned = models
        out = ["-o", tmp_path / "s.npz"]
        for arguments, part in [
            (["weights", tmp_path / "no", *out], "no: No such file or directory"),
            (["delta", base, tmp_path / "no", *out], "no: No such file or directory"),
            (["weights", base, "-o", tmp_path / "no" / "s.npz"], "s.npz: No such file"),
            (["weights", base, "-o", base], "base: Is a directory"),
            (["weights", base, "-o", base / "model.safetensors"], "expected a file to write spec"),
            (["delta", base, tuned, "-o", tuned / "model.safetensors"], "expected a file to write"),
            (["weights", base, *out, "--targets", "k_proj"], "targets=['k_proj'], got none"),
            (["weights", base, *out, "--targets", "("], "expected a regular expression"),
            (["weights", base, *out, "--targets", "a,,b"], "names with commas between"),
            (["weights", base, *out, "--rank", "0"], "rank: expected a whole number"),
            (["weights", base, *out, "--rank", "few"], "rank: expected a whole number"),
            (["weights", base, *out, "--device", "nothing"], "device 'nothing' cannot be used"),
            (["weights", tmp_path, *out], "expected *.safetensors or *.bin files"),
            (["weights", base], "--output"),
            (["delta", base, *out], "TUNED"),
            ([], "lorambo --help"),
        ]:
            assert part in refusal(capsys, "spectra", *arguments), arguments
        (tuned / "model.safetensors").write_bytes(b"short")
        assert "model.safetensors: the file is damaged" in refusal(
            capsys, "spectra", "delta", base, tuned, *out
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]

    def test_an_interrupt_says_how_to_go_on(self, capsys, models, tmp_path, monkeypatch):
        from lorambo_adapters.spectra import extraction

        decompose, left = extraction.decompose, [2]

        def interrupted(*arguments, **keywords):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return decompose(*arguments, **keywords)

        monkeypatch.setattr(extraction, "decompose", interrupted)
        arguments = ["spectra", "weights", str(models[0]), "-o", str(tmp_path / "s.npz")]
        assert main(arguments) == 130
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == "lorambo: interrupted; start it again in the same way to continue\n"
        left[0] = 2
        assert main(arguments) == 0  # two were done, and two were left

    def test_without_torch(self, capsys, models, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("lorambo_adapters.spectra.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torch", None)
        for command in (["weights", models[0]], ["delta", *models]):
            said = refusal(capsys, "spectra", *command, "-o", tmp_path / "s.npz")
            assert said.endswith("pip install 'lorambo-alloc[torch]'\n")
