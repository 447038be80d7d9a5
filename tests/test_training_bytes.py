"""Bytes for a unit of rank: the formula, and the tensors of a training step."""

import math

import pytest

from lorambo_alloc import Spectra, allocate
from lorambo_alloc.costs import training_bytes

SHAPES = {"q": (24, 40), "v": (8, 40)}
PARAMETERS = {"q": 64, "v": 48}


@pytest.mark.parametrize(
    ("keywords", "each"),
    [
        ({}, 16),
        ({"optimizer": "sgd"}, 8),
        ({"optimizer": "sgd_momentum"}, 12),
        ({"dtype": "bfloat16"}, 8),
        ({"dtype": "float16"}, 8),
        ({"dtype": "bfloat16", "optimizer": "sgd"}, 4),
        ({"dtype": "float16", "optimizer": "sgd_momentum"}, 6),
        # 2 + 2 + two float32 states + the master copy
        ({"dtype": "bfloat16", "master_weights": True}, 16),
        ({"dtype": "float16", "master_weights": True, "optimizer": "sgd_momentum"}, 12),
        ({"dtype": "float16", "master_weights": True, "optimizer": "sgd"}, 8),
        # autocast keeps the factors in half precision beside
        ({"activation_dtype": "bfloat16"}, 18),
        ({"activation_dtype": "float32"}, 16),
        ({"dtype": "bfloat16", "activation_dtype": "bfloat16"}, 8),
        ({"dtype": "bfloat16", "activation_dtype": "float32"}, 12),
    ],
)
def test_bytes_a_parameter(keywords, each):
    expected = {name: count * each for name, count in PARAMETERS.items()}
    assert training_bytes(SHAPES, **keywords) == expected


@pytest.mark.parametrize(
    ("keywords", "each"),
    [({}, 4), ({"dtype": "bfloat16"}, 2), ({"activation_dtype": "float16"}, 2)],
)
def test_bytes_a_token(keywords, each):
    without, one, many = (training_bytes(SHAPES, tokens=t, **keywords) for t in (0, 1, 1000))
    for name in SHAPES:
        assert one[name] - without[name] == each
        assert many[name] - without[name] == 1000 * each


def test_tokens_by_name():
    costs = training_bytes(SHAPES, tokens={"q": 5, "v": 0})
    assert costs == {"q": 64 * 16 + 20, "v": 48 * 16}


@pytest.mark.parametrize(
    ("side", "blocks"), [(1, 1), (255, 1), (256, 1), (257, 2), (512, 2), (4096, 16), (4097, 17)]
)
def test_bytes_of_8_bit_states(side, blocks):
    # Two states of a byte a number, each with a float32 scale a block; a side of 1 has one block.
    costs = training_bytes({"q": (side, 1)}, optimizer="adamw_8bit")
    assert costs == {"q": 8 * (side + 1) + 2 * (side + 4 * blocks) + 2 * (1 + 4)}
    half = training_bytes({"q": (side, 1)}, optimizer="adamw_8bit", dtype="bfloat16")
    assert half == {"q": costs["q"] - 4 * (side + 1)}
    master = training_bytes(
        {"q": (side, 1)}, optimizer="adamw_8bit", dtype="bfloat16", master_weights=True
    )
    assert master == costs


def test_a_budget_in_bytes():
    spectra = Spectra({"q": [3.0, 2.0, 1.0], "v": [2.5, 0.5]}, shapes=SHAPES)
    assert spectra.shapes is not None
    costs = training_bytes(spectra.shapes, dtype="bfloat16", tokens=100)
    assert costs == {"q": 712, "v": 584}
    assert all(type(cost) is int for cost in costs.values())
    allocation = allocate(spectra, 2 * 712 + 584, costs=costs)
    assert dict(allocation) == {"q": 2, "v": 1}
    assert allocation.cost == 2008


def test_no_layers():
    assert training_bytes({}) == {}


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"dtype": "int8"}, "^dtype: expected one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        ({"dtype": None}, "^dtype: expected one of .* got None"),
        (
            {"optimizer": "adam"},
            "^optimizer: expected one of 'adamw', 'adamw_8bit', 'sgd', 'sgd_momentum', got 'adam'",
        ),
        ({"activation_dtype": "int8"}, "^activation_dtype: expected one of 'float32'"),
        ({"master_weights": True}, "^master_weights: expected weights in half precision"),
        ({"tokens": -1}, "^tokens: layer 'q': expected a whole number >= 0, got -1"),
        ({"tokens": 1.5}, "^tokens: layer 'q': expected a whole number >= 0, got 1.5"),
        ({"tokens": {"q": 1}}, "^tokens: layer 'v' is missing"),
        ({"tokens": {"q": 1, "v": 1, "w": 1}}, "^tokens: layer 'w' is not among"),
    ],
)
def test_what_is_refused(keywords, expected):
    with pytest.raises(ValueError, match=expected):
        training_bytes(SHAPES, **keywords)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (None, r"^shapes: expected a mapping of layer name to \(d, k\), got None"),
        ([(3, 4)], r"^shapes: expected a mapping of layer name to \(d, k\), got \[\(3, 4\)\]"),
        ({"q": 3}, r"^shapes: layer 'q': expected \(d, k\), got 3"),
        ({"q": (3,)}, r"^shapes: layer 'q': expected \(d, k\), got \(3,\)"),
        ({"q": (3, 4, 5)}, r"^shapes: layer 'q': expected \(d, k\), got \(3, 4, 5\)"),
        ({"q": (0, 4)}, "^shapes: layer 'q': expected a whole number >= 1, got 0"),
        ({"q": (4, 0.5)}, "^shapes: layer 'q': expected a whole number >= 1, got 0.5"),
    ],
)
def test_shapes_that_are_none(shapes, expected):
    with pytest.raises(ValueError, match=expected):
        training_bytes(shapes)


# -- against real tensors ------------------------------------------------------------------------

RANK, TOKENS = 3, 17


def size(tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.fixture(name="torch")
def torch_on_one_thread():
    torch = pytest.importorskip(
        "torch", reason="torch is absent: pip install 'lorambo-alloc[torch]'"
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


def adapter(torch, shape, rank, dtype):
    """The two factors as PEFT has them: lora_A and lora_B."""
    d, k = shape
    return (
        torch.nn.Linear(k, rank, bias=False, dtype=dtype),
        torch.nn.Linear(rank, d, bias=False, dtype=dtype),
    )


def step(torch, factors, optimizer, dtype):
    """Bytes of weights, gradients and states after one step; counters of steps left out."""
    weights = [factor.weight for factor in factors]
    made = {
        "adamw": lambda: torch.optim.AdamW(weights, lr=0.01),
        "sgd": lambda: torch.optim.SGD(weights, lr=0.01),
        "sgd_momentum": lambda: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    }[optimizer]()
    x = torch.ones(2, factors[0].in_features, dtype=dtype)
    factors[1](factors[0](x)).sum().backward()
    made.step()
    states = [s for state in made.state.values() for s in state.values() if s is not None]
    return sum(
        size(tensor)
        for tensor in [*weights, *(w.grad for w in weights), *states]
        if tensor.numel() > 1
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd_momentum"])
def test_weights_gradients_and_states(torch, optimizer, dtype):
    real = getattr(torch, dtype)
    costs = training_bytes(SHAPES, dtype=dtype, optimizer=optimizer)
    for name, shape in SHAPES.items():
        measured = step(torch, adapter(torch, shape, RANK, real), optimizer, real)
        assert measured == RANK * costs[name]


def saved_bytes(torch, shape, rank, dtype, dropout, autocast=None) -> int:
    """Bytes that autograd saves in an adapter's forward pass, weights themselves left out."""
    first, second = adapter(torch, shape, rank, dtype)
    drop = torch.nn.Dropout(dropout) if dropout else torch.nn.Identity()
    x = torch.randn(TOKENS, shape[1], dtype=dtype, requires_grad=True)
    base = torch.randn(TOKENS, shape[0], dtype=dtype)
    own = {first.weight.data_ptr(), second.weight.data_ptr()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = size(tensor), tensor  # kept, so that no address is reused
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        (base + second(first(drop(x))) * 2.0).sum()
    return sum(count for count, _ in saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_activations(torch, dtype, dropout):
    real = getattr(torch, dtype)
    plain, kept = (training_bytes(SHAPES, dtype=dtype, tokens=tokens) for tokens in (0, TOKENS))
    for name, shape in SHAPES.items():
        # What does not depend on the rank (x, dropout's mask) falls out of the difference.
        measured = saved_bytes(torch, shape, 1 + RANK, real, dropout)
        measured -= saved_bytes(torch, shape, 1, real, dropout)
        assert measured == RANK * (kept[name] - plain[name])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_activations_and_factors_under_autocast(torch, dropout):
    plain = training_bytes(SHAPES)
    kept = training_bytes(SHAPES, tokens=TOKENS, activation_dtype="bfloat16")
    for name, shape in SHAPES.items():
        measured = saved_bytes(torch, shape, 1 + RANK, torch.float32, dropout, torch.bfloat16)
        measured -= saved_bytes(torch, shape, 1, torch.float32, dropout, torch.bfloat16)
        assert measured == RANK * (kept[name] - plain[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("shape", "rank"), [((4096, 512), 8), ((1000, 1030), 5), ((4097, 5000), 1)]
)
def test_8_bit_states(torch, shape, rank):
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is absent: 8-bit states are as its source has them"
    )
    factors = adapter(torch, shape, rank, torch.float32)
    optimizer = bitsandbytes.optim.AdamW8bit([f.weight for f in factors], lr=0.01)
    factors[1](factors[0](torch.ones(2, shape[1]))).sum().backward()
    optimizer.step()
    measured = sum(
        size(state[key])
        for state in optimizer.state.values()
        for key in ("state1", "state2", "absmax1", "absmax2")
    )
    with_states = training_bytes({"q": shape}, optimizer="adamw_8bit")["q"]
    counted = rank * (with_states - training_bytes({"q": shape}, optimizer="sgd")["q"])
    blocks = sum(rank * math.ceil(s / 256) - math.ceil(rank * s / 256) for s in shape)
    assert measured == counted - 8 * blocks
    assert counted < 1.02 * measured


@pytest.mark.filterwarnings("ignore")
def test_small_tensors_stay_in_32_bits(torch):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is absent")
    weight = torch.nn.Parameter(torch.ones(3, 1365))
    weight.grad = torch.ones_like(weight)
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.01)
    optimizer.step()
    state = optimizer.state[weight]
    measured = size(state["state1"]) + size(state["state2"])
    assert measured == 8 * 4095
    assert measured - 2 * 4095 == 24_570
