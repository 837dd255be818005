"""Write tests/golden/mergekit.json: what mergekit makes of small models and these files.

Run it where mergekit 0.1.5 is installed: ``python tests/make_mergekit_golden.py``. It calls the
command mergekit-pytorch once for each file.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from mergekit.scripts.merge_raw_pytorch import main
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).resolve().parent / "golden" / "mergekit.json"
SHAPES = {
    "logit_scale": (),
    "ln.bias": (7,),
    "blocks.0.proj.weight": (6, 5),
    "blocks.1.conv.weight": (4, 3, 2, 2),
}
MODELS = ("base", "a", "b", "c")


def deltas(method: str, *models: str, rest: str = "") -> str:
    """Return a file with parameters such as ``a: weight: 0.3, density: 0.5``."""
    lines = [f"merge_method: {method}", "base_model: base.safetensors", "models:"]
    for model in models:
        name, _, parameters = model.partition(": ")
        lines.append(f"  - model: {name}.safetensors")
        if parameters:
            lines.append(f"    parameters: {{{parameters}}}")
    return "\n".join(lines) + f"\n{rest}"


ONES = ("a: weight: 1", "b: weight: 1", "c: weight: 1")
UNEQUAL = ("a: weight: 0.7", "b: weight: 0.2", "c: weight: 0.4")
SPARSE = (
    "a: weight: 0.7, density: 0.5",
    "b: weight: 0.2, density: 0.5",
    "c: weight: 0.4, density: 0.5",
)
MIXED = (
    "a: weight: 0.7, density: 0.3",
    "b: weight: 0.2, density: 1",
    "c: weight: 0.4, density: 0.6",
)
CASES = {
    "task_arithmetic": deltas("task_arithmetic", *UNEQUAL),
    "task_arithmetic negated": deltas("task_arithmetic", "a: weight: -0.5", "b: weight: 1.5"),
    "task_arithmetic normalized": deltas(
        "task_arithmetic", *UNEQUAL, rest="parameters: {normalize: true, lambda: 0.8}\n"
    ),
    "task_arithmetic averaged": deltas(
        "task_arithmetic", *ONES, rest="parameters: {normalize: true, lambda: 0.8}\n"
    ),
    "task_arithmetic cancelling": deltas(
        "task_arithmetic", "a: weight: 1", "b: weight: -1", rest="parameters: {normalize: true}\n"
    ),
    "linear": deltas("linear", *UNEQUAL).replace("base_model: base.safetensors\n", ""),
    "linear averaged": deltas("linear", *ONES).replace("base_model: base.safetensors\n", ""),
    "linear with a base": deltas("linear", "a", "b", rest="parameters: {weight: 0.5}\n"),
    "linear summed": deltas(
        "linear", *UNEQUAL, "base: weight: 0.1", rest="parameters: {normalize: false}\n"
    ),
    "slerp": deltas("slerp", "a", rest="parameters: {t: 0.3}\n"),
    "slerp at the end": deltas("slerp", "a", "base", rest="parameters: {t: 1}\n"),
    "model_stock": deltas("model_stock", "a", "b", "c"),
    "model_stock of two": deltas("model_stock", "base", "a", "b"),
    "ties": deltas("ties", *SPARSE),
    "ties averaged": deltas("ties", *ONES, rest="parameters: {density: 0.4, lambda: 0.9}\n"),
    "ties summed": deltas("ties", *SPARSE, rest="parameters: {normalize: false}\n"),
    "ties with negative weights": deltas(
        "ties",
        "a: weight: -0.7",
        "b: weight: 0.5",
        rest="parameters: {normalize: false, density: 0.6}\n",
    ),
    "ties of all elements": deltas("ties", *UNEQUAL),
    "ties of other densities": deltas("ties", *MIXED),
    "ties without one": deltas("ties", *SPARSE[:2], "c: weight: 0.4, density: 0"),
    "dare_linear of all elements": deltas("dare_linear", *UNEQUAL),
    "dare_ties of all elements": deltas("dare_ties", *UNEQUAL),
    "dare_ties normalized": deltas("dare_ties", *UNEQUAL, rest="parameters: {normalize: true}\n"),
    "della_linear of all elements": deltas("della_linear", *UNEQUAL),
    "della of all elements": deltas("della", *UNEQUAL),
    "breadcrumbs": deltas("breadcrumbs", *SPARSE, rest="parameters: {gamma: 0.2}\n"),
    "breadcrumbs by default": deltas("breadcrumbs", *MIXED),
    "breadcrumbs normalized": deltas(
        "breadcrumbs", *MIXED, rest="parameters: {gamma: 0.1, normalize: true}\n"
    ),
    "breadcrumbs_ties": deltas("breadcrumbs_ties", *SPARSE, rest="parameters: {gamma: 0.2}\n"),
    "breadcrumbs_ties normalized": deltas(
        "breadcrumbs_ties", *MIXED, rest="parameters: {gamma: 0.1, normalize: true, lambda: 2}\n"
    ),
}


def models() -> dict[str, dict[str, np.ndarray]]:
    """Return a base and three models that come from it, by name."""
    random = np.random.default_rng(20230501)
    base = {name: random.normal(0, 0.05, shape) for name, shape in SHAPES.items()}
    found = {"base": base}
    for model in MODELS[1:]:
        found[model] = {
            name: value + random.normal(0, 0.01, value.shape) for name, value in base.items()
        }
    return {
        model: {name: np.asarray(value, np.float32) for name, value in tensors.items()}
        | {"positions": np.arange(5)}
        for model, tensors in found.items()
    }


def flat(tensors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return tensors as lists of the shortest numbers that give the same float32."""
    return {
        name: [json.loads(str(number)) for number in tensors[name].ravel()]
        for name in sorted(tensors)
    }


def lines(content: dict[str, object]) -> str:
    """Return JSON with a line for each key."""
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    return "{\n" + ",\n".join(parts) + "\n}"


def run(text: str) -> dict[str, np.ndarray]:
    """Return what mergekit-pytorch makes of a file in the working directory."""
    Path("config.yaml").write_text(text)
    main(["config.yaml", "out", "--quiet"], standalone_mode=False)
    return load_file("out/model.safetensors")


if __name__ == "__main__":
    inputs = models()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for model, tensors in inputs.items():
            save_file(tensors, f"{model}.safetensors")
        results = {name: {"file": text, "result": flat(run(text))} for name, text in CASES.items()}
    content = {
        "mergekit": json.dumps("0.1.5"),
        "shapes": json.dumps(SHAPES | {"positions": (5,)}),
        "models": lines({model: flat(tensors) for model, tensors in inputs.items()}),
        "cases": lines(results),
    }
    GOLDEN.write_text(
        "{\n" + ",\n".join(f'"{key}": {value}' for key, value in content.items()) + "\n}\n"
    )
