"""The export's arithmetic as ONNX, for servers without Python.

    recommend.onnx   history int64[h], weight f32[h], part f32[D], exclude int64[e], k int64[1], [rank f32[h]]
                     -> rows int64[k], scores f32[k]                      rows are lines of item_ids.txt
    text_map.onnx    text_vector f32[n,F] -> item_vector f32[n,D], item_source f32[n,D], item_bias f32[n]

The graphs hold no tables: their weights are external data, the very bytes of the .safetensors files beside them. The formulas
are those of ``query.py`` and ``text_map.py``. ``part`` is the user's row of user.part, zeros without one; a new item's
vector and bias score as <q, vector> + bias.
"""

import json
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.export.manifest import ONNX_RECOMMEND, ONNX_TEXT_MAP, TEXT_MAP, VECTORS, Block
from recbole_llm.export.pooling import TINIEST, TINY, Pooling
from recbole_llm.export.reader import Export
from recbole_llm.export.sequence import SCORING

OPSET = 17
IR_VERSION = 8  # of opset 17: what every runtime of the last years reads
CHECKED_USERS = 16
CHECKED_K = 10

log = getLogger(__name__)


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ValueError("--onnx needs onnx: pip install -e '.[onnx]' in the checkout.") from error
    return onnx


class _Graph:
    """Nodes and weights of one graph."""

    def __init__(self, folder: Path, file: str) -> None:
        self.onnx = _onnx()
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.file = file
        with (folder / file).open("rb") as content:
            header_bytes = int.from_bytes(content.read(8), "little")
            self.header: Mapping[str, Any] = json.loads(content.read(header_bytes))
        self.data_starts_at = 8 + header_bytes

    def tensor(self, name: str) -> str:
        """A tensor of the file, left where it is."""
        entry, proto = self.header[name], self.onnx.TensorProto
        kinds = {"F32": proto.FLOAT, "U8": proto.UINT8}
        start, stop = entry["data_offsets"]
        tensor = proto(name=name, data_type=kinds[entry["dtype"]], dims=entry["shape"], data_location=proto.EXTERNAL)
        place = {"location": self.file, "offset": self.data_starts_at + start, "length": stop - start}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        if not any(known.name == name for known in self.weights):
            self.weights.append(tensor)
        return name

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small weight inside the graph."""
        name = f"constant_{len(self.weights)}"
        self.weights.append(self.onnx.numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node; the name of its first output."""
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        outputs = [name] if kind != "TopK" else [name, "rows"]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, **attributes))
        return name

    def save(self, path: Path, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Write the model; inputs and outputs are name to (dtype, shape)."""
        helper, kinds = self.onnx.helper, {"float": self.onnx.TensorProto.FLOAT, "int64": self.onnx.TensorProto.INT64}
        infos = [
            [helper.make_tensor_value_info(name, kinds[kind], shape) for name, (kind, shape) in part.items()]
            for part in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, path.stem, *infos, initializer=self.weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="recbole-llm"
        )
        path.write_bytes(model.SerializeToString())
        self.onnx.checker.check_model(str(path))


def check_blocks(blocks: Sequence[Block]) -> None:
    """Refuse blocks that the graphs cannot express.

    Raises:
        ValueError: naming the first.
    """
    for block in blocks:
        if block.scoring == SCORING:
            raise ValueError(
                f"onnx: the {block.name} block reads the order of a history, and the graphs hold sums over histories alone. "
                f"Leave onnx out, or train without {block.name} in blocks."
            )


def write_graphs(folder: Path, blocks: Sequence[Block], text_map: Mapping[str, Any] | None) -> None:
    """Write the graphs beside the tables that they read.

    Args:
        folder: the export, its tables written.
        blocks: the columns.
        text_map: ``kind`` and ``normalize`` of the text map, or ``None``.

    Raises:
        ValueError: if onnx is not installed, or a block reads the order of a history.
    """
    check_blocks(blocks)
    _write_recommend(folder, blocks)
    if text_map is not None:
        _write_text_map(folder, text_map)


def _write_recommend(folder: Path, blocks: Sequence[Block]) -> None:
    graph = _Graph(folder, VECTORS)
    op, D = graph.op, sum(block.dim for block in blocks)
    history = op("Gather", graph.tensor("item.source"), "history", axis=0)
    fixed = op("Add", graph.tensor("user.offset"), "part")
    queries, start = [], 0
    for block in blocks:
        bounds = (graph.constant([start], np.int64), graph.constant([start + block.dim], np.int64))
        first, start = graph.constant([0], np.int64), start + block.dim
        weight = "weight"
        if block.decay is not None:
            weight = op("Mul", weight, op("Exp", op("Neg", op("Div", "rank", graph.constant(block.decay)))))
        total = op("Max", op("ReduceSum", weight, keepdims=0), graph.constant(TINIEST))
        pooled = op("Mul", weight, op("Pow", total, graph.constant(-block.exponent)))
        source = op("Slice", history, *bounds, graph.constant([1], np.int64))
        x = op("Add", op("MatMul", pooled, source), op("Slice", fixed, *bounds, first))
        if block.scoring == "cosine":
            norm = op("Sqrt", op("ReduceSum", op("Mul", x, x), keepdims=0))
            x = op("Div", x, op("Max", norm, graph.constant(TINY)))
        queries.append(op("Mul", x, graph.constant(block.scale)))
    query = op("Concat", *queries, axis=0)
    minus_infinity = graph.constant(-np.inf)
    listed = op("Cast", graph.tensor("item.listed"), to=graph.onnx.TensorProto.BOOL)
    bias = op("Where", listed, graph.tensor("item.bias"), minus_infinity)
    scores = op("Add", op("MatMul", graph.tensor("item.vector"), query), bias)
    hidden = op("Expand", minus_infinity, op("Shape", "exclude"))
    scores = op("ScatterElements", scores, "exclude", hidden, axis=0)
    op("TopK", scores, "k", output="scores", axis=0)
    vector = ("float", ["h"])
    inputs = {"history": ("int64", ["h"]), "weight": vector, "part": ("float", [D])}
    inputs |= {"exclude": ("int64", ["e"]), "k": ("int64", [1])}
    if any(block.decay is not None for block in blocks):
        inputs["rank"] = vector
    graph.save(folder / ONNX_RECOMMEND, inputs, {"rows": ("int64", ["k"]), "scores": ("float", ["k"])})


def _write_text_map(folder: Path, text_map: Mapping[str, Any]) -> None:
    graph = _Graph(folder, TEXT_MAP)
    op, header = graph.op, graph.header
    z = op("Sub", "text_vector", graph.tensor("center"))
    if "transform" in header:
        z = op("MatMul", z, graph.tensor("transform"))
    axis = graph.constant([1], np.int64)
    square = lambda value: op("ReduceSum", op("Mul", value, value), axis, keepdims=1)  # noqa: E731
    if text_map["normalize"]:
        z = op("Div", z, op("Max", op("Sqrt", square(z)), graph.constant(1e-12)))
    if "support" in header:
        support = graph.tensor("support")
        products = op("MatMul", z, op("Transpose", support, perm=[1, 0]))
        lengths = op("Add", square(z), op("Transpose", square(support), perm=[1, 0]))
        distance = op("Sub", lengths, op("Mul", products, graph.constant(2.0)))
        distance = op("Max", distance, graph.constant(0.0))
        z = op("Exp", op("Neg", op("Mul", distance, graph.tensor("gamma"))))
    for name in ("vector", "source", "bias"):
        op("Add", op("MatMul", z, graph.tensor(name)), graph.tensor(f"{name}_offset"), output=f"item_{name}")
    F, D = header["center"]["shape"][0], header["vector"]["shape"][1]
    outputs = {"item_vector": ("float", ["n", D]), "item_source": ("float", ["n", D]), "item_bias": ("float", ["n"])}
    graph.save(folder / ONNX_TEXT_MAP, {"text_vector": ("float", ["n", F])}, outputs)


def check_graphs(export: Export) -> bool:
    """Compare the graphs with the Python they stand for, for some users and texts.

    Returns:
        Whether they were run: it takes onnxruntime.

    Raises:
        ValueError: if they give other answers.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        log.warning("The ONNX graphs were not run: pip install onnxruntime to have them compared with the model.")
        return False
    session = lambda name: onnxruntime.InferenceSession(str(export.folder / name), providers=["CPUExecutionProvider"])  # noqa: E731
    recommend, pooling = session(ONNX_RECOMMEND), Pooling.of(export)
    step = max(len(export.user_ids) // CHECKED_USERS, 1)
    for user in range(0, len(export.user_ids), step):
        span = slice(int(export.history_offsets[user]), int(export.history_offsets[user + 1]))
        history = export.history_items[span].astype(np.int64)
        own = export.part_of(user)
        part = np.zeros(export.manifest.dim, np.float32) if own is None else own
        asked = {"history": history, "weight": export.history_weight[span], "part": part, "exclude": history}
        ranks = None if export.history_rank is None else export.history_rank[span]
        if ranks is not None:
            asked["rank"] = ranks
        query = pooling.query(export.source[history], export.history_weight[span], part, ranks)
        scores_of = np.where(export.listed, export.vector @ query.vector + export.bias, -np.inf)
        scores_of[history] = -np.inf
        wanted = np.argsort(-scores_of, kind="stable")[: min(CHECKED_K, int(np.isfinite(scores_of).sum()))]
        asked["k"] = np.array([len(wanted)], np.int64)
        rows, scores = recommend.run(["rows", "scores"], asked)
        _same(ONNX_RECOMMEND, scores, scores_of[wanted])
        if len(set(rows.tolist()) ^ set(wanted.tolist())) > 2:  # the last may be tied
            raise ValueError(f"{ONNX_RECOMMEND} recommends other items than the model to user {user}.")
    if export.text_map is not None:
        vectors = np.random.default_rng(0).standard_normal(
            (CHECKED_USERS, export.text_map.feature_dim), dtype=np.float32
        )
        found = session(ONNX_TEXT_MAP).run(["item_vector", "item_source", "item_bias"], {"text_vector": vectors})
        for got, expected in zip(found, export.text_map.apply(vectors), strict=True):
            _same(ONNX_TEXT_MAP, got, expected)
    return True


def _same(name: str, got: np.ndarray, expected: np.ndarray) -> None:
    scale = float(np.abs(expected).max(initial=1e-6))
    if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-3, atol=1e-4 * scale):
        raise ValueError(f"{name} does not compute what the model computes.")
