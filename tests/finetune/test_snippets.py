import pytest

from benchmarks.finetune import sources
from benchmarks.finetune.snippets import read


def test_a_snippet_is_in_one_split_and_the_order_of_the_file_does_not_matter(tmp_path):
    lines = [f"{i}\t{(-1) ** i * 1.5}\tsnippet  number {i}" for i in range(9_000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))
    splits = read(tmp_path / "a.txt")
    assert splits == read(tmp_path / "b.txt")
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [6000, 2566, 434]
    assert len({snippet.text for part in splits.values() for snippet in part}) == 9_000
    assert {s.label for s in splits["train"] if int(s.text.split()[-1]) % 2 == 0} == {1}


def test_neutral_and_repeated_snippets_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("1\t0.0\tneutral\n2\t1.0\ttwice\n3\t-1.0\ttwice\n")
    assert [s.text for s in read(tmp_path / "a.txt")["train"]] == ["twice"]


def test_another_line_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("1\t0.5\tfine\nno tabs here\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: expected ID, rating and text, got 'no tabs"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("rating", ["good", "nan"])
def test_a_rating_that_is_no_number_is_named(tmp_path, rating):
    (tmp_path / "a.txt").write_text(f"1\t0.5\tfine\n2\t{rating}\tfilm\n")
    with pytest.raises(ValueError, match=rf"a\.txt:2: expected a number as rating, got '{rating}'"):
        read(tmp_path / "a.txt")


def test_gemma_asks_for_the_snippets_before_it_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMBO_FINETUNE", str(tmp_path))
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(FileNotFoundError, match="prepare snippets"):
        sources.prepare(["gemma"])
