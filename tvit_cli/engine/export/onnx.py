"""`--format onnx`: formats.graphs for ONNX Runtime and other programs that read ONNX."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from tvit_cli.engine.export import formats
from tvit_cli.engine.export.formats import Format, Job
from tvit_cli.errors import ModelError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_FILE = 1_900_000_000  # bytes; protobuf is limited to 2 GiB, and larger weights go to a second file
INPUTS = {
    formats.FRAMES: "uint8 (B, T, H, W, 3), RGB as decoded",
    formats.PIXELS: "float32 (B, T, 3, S, S), resized and normalised",
}
SAMPLING = (
    "The frame in the middle of each of n_frames equal shares of the video: of N frames, share s gives frame "
    "floor((s + 1/2) N / n_frames). With fewer frames than n_frames: all, then the last again. With frame_grid G: "
    "the same, of the G frames that this rule chooses first. With clip_seconds S: those shown, by time stamps, "
    "every S / n_frames seconds from the largest multiple of this step before the middle S seconds."
)


def check(job: Job) -> None:
    """Raises ModelError where a package is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        names = ", ".join(missing)
        raise ModelError(
            f'--format onnx needs {names}, which this environment lacks. Run: python -m pip install "tvit[onnx]"'
        )


def write(job: Job, folder: Path) -> None:
    """Writes model.onnx, preprocessing.onnx unless it is inside the model, card.json and the package `source`."""
    import onnx

    card = job.trained.card
    for name, graph in formats.graphs(job).items():
        path = folder / f"{name}.onnx"
        _trace(graph, path)
        if job.settings.int8 and name == "model":
            _quantise(path)
        model = onnx.load(path, load_external_data=False)
        properties = {
            "labels": json.dumps(card.labels, ensure_ascii=False),
            "preprocessing": card.preprocessing.model_dump_json(),
            "sampling": SAMPLING,
            "input": f"{graph.input_name}: {INPUTS[graph.input_name]}",
            "output": graph.output_name,
            "tvit_version": card.tvit_version,
            "weights_sha256": card.weights_sha256,
        }
        onnx.helper.set_model_props(model, properties)
        onnx.save(model, path)
    job.write_card(folder)
    formats.copy_source(folder)


def load(folder: Path) -> AbstractContextManager[formats.Predictor]:
    """The exported formats.graphs in ONNX Runtime, on frames read by the export's own `reading.py`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors

    def graph(path: Path) -> tuple[dict[str, str], Callable[[Tensor], Tensor]]:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        facts = session.get_modelmeta().custom_metadata_map
        return facts, lambda values: torch.from_numpy(session.run(None, {name: values.numpy()})[0])

    facts, model = graph(folder / "model.onnx")
    outside = folder / "preprocessing.onnx"
    preprocess = graph(outside)[1] if outside.is_file() else None
    return formats.graph_predictor(folder, json.loads(facts["preprocessing"]), model, preprocess)


def _trace(graph: formats.Graph, path: Path) -> None:
    weights = sum(tensor.nbytes for tensor in graph.module.state_dict().values())
    with formats.suppress_logs():
        program = torch.onnx.export(
            graph.module,
            (graph.example,),
            dynamo=True,
            opset_version=20,
            input_names=[graph.input_name],
            output_names=[graph.output_name],
            dynamic_shapes=(graph.dynamic,),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=weights > LARGEST_FILE)


def _quantise(path: Path) -> None:
    """Quantises the weights of matrix products to int8, per output channel, in place."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[:]  # shapes that contradict those of the quantised graph
    with formats.suppress_logs():
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 7 bits: sums of 8 overflow on processors without VNNI
        )


FORMAT = Format(
    write,
    load,
    packages=PACKAGES,
    library="onnx",
    check=check,
    suffix="onnx",
    preprocess='preprocess = onnxruntime.InferenceSession("FOLDER/preprocessing.onnx")\n'
    '(clips,) = preprocess.run(None, {"frames": clips})\n',
)
