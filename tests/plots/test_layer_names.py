"""Blocks, module types and grids, read off the names of layers. No picture, no matplotlib."""

import pytest

from lorambo_alloc.plots.layer_names import module_type, shortest, split
from lorambo_alloc.plots.rank_grid import Column, grid_of

LLAMA = [f"model.layers.{b}.self_attn.{m}_proj" for b in range(32) for m in "qkvo"]


def experts(count: int, blocks: int = 2) -> list[str]:
    return [
        f"model.layers.{b}.mlp.experts.{e}.{w}"
        for b in range(blocks)
        for e in range(count)
        for w in ("up", "down")
    ]


def test_one_stack_has_numbered_blocks_and_two_have_their_names():
    assert split(["layers.2.q", "head"])[0] == ["block 2", ""]
    blocks, modules, depths = split(["encoder.block.0.q", "decoder.block.10.q"])
    assert blocks == ["encoder.block.0", "decoder.block.10"]
    assert modules == ["q", "q"]
    assert depths == [("encoder.block", 0), ("decoder.block", 10)]


@pytest.mark.parametrize(
    ("name", "depth", "module"),
    [
        ("1.experts.0.up", ("", 1), "experts.0.up"),  # the first number, also where it starts
        ("a.1.b.2.c", ("a", 1), "b.2.c"),
        ("a.b.7", ("a.b", 7), ""),
        ("layer1.conv2", ("", -1), "layer1.conv2"),
    ],
)
def test_the_block_is_the_first_number(name, depth, module):
    _, modules, depths = split([name])
    assert (depths, modules) == ([depth], [module])


def test_a_star_for_numbers_only():
    assert module_type("experts.17.w1") == "experts.*.w1"
    assert module_type("layer1.conv2") == "layer1.conv2"


def test_the_shortest_names_stay_apart():
    modules = ["attention.self.query", "attention.output.dense", "output.dense", "experts.*.up"]
    short = shortest(modules)
    assert list(short.values()) == ["query", "attention.output.dense", "output.dense", "up"]
    # No name starts with a star.
    assert shortest(["experts.*.up", "shared.up"])["experts.*.up"] == "experts.*.up"


def test_a_plain_grid():
    grid = grid_of(LLAMA)
    assert [number for _, number in grid.blocks] == list(range(32))
    assert grid.columns == tuple(Column(f"{m}_proj", 1) for m in "qkvo")
    assert grid.places["model.layers.10.self_attn.v_proj"] == (10, 2, 0)
    assert grid.alone == ()
    assert grid.row_labels == [str(b) for b in range(32)]


def test_blocks_are_in_the_order_of_their_numbers_and_stacks_as_they_come():
    names = [f"{stack}.{b}.q" for stack in ("encoder", "decoder") for b in (10, 2)]
    grid = grid_of(names)
    assert grid.blocks == (("encoder", 2), ("encoder", 10), ("decoder", 2), ("decoder", 10))
    assert grid.row_labels == ["encoder.2", "10", "decoder.2", "10"]


def test_experts_share_a_column_in_the_order_of_their_numbers():
    grid = grid_of(experts(12)[::-1])
    assert grid.columns == (Column("down", 12), Column("up", 12))
    assert grid.places["model.layers.1.mlp.experts.10.up"] == (1, 1, 10)
    assert grid.places["model.layers.1.mlp.experts.9.up"] == (1, 1, 9)


def test_experts_keep_their_cell_where_others_are_missing():
    names = [*experts(3, blocks=1), "model.layers.1.mlp.experts.2.up"]
    assert grid_of(names).places[names[-1]] == (1, 0, 2)


def test_numbers_that_differ_between_blocks_alone_share_a_cell():
    names = ["encoder.block.0.layer.1.wi", "decoder.block.0.layer.2.wi"]
    grid = grid_of(names)
    assert grid.columns == (Column("wi", 1),)
    assert [grid.places[name] for name in names] == [(0, 0, 0), (1, 0, 0)]


@pytest.mark.parametrize("names", [["embed", "classifier.dense"], ["head"]])
def test_names_without_numbers_lie_in_no_row(names):
    grid = grid_of(names)
    assert (grid.blocks, grid.columns, grid.alone) == ((), (), tuple(names))


def test_bare_numbers_are_blocks():
    grid = grid_of(["0", "1"])
    assert grid.columns == (Column("layer", 1),)
    assert grid.places == {"0": (0, 0, 0), "1": (1, 0, 0)}
