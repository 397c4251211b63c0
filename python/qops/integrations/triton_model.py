"""The model that NVIDIA's Triton Inference Server runs by its Python backend.

:func:`qops.integrations.serving.write_triton_generator` writes what the server needs of it.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch

import qops

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """``(input_ids [B, S] int64, new_tokens [1] int64) -> output_ids [B, new_tokens] int64``, greedily, without an end.

    Prompts of one request have one length. A request that does not fit is answered by an error that says why, and the
    others of its batch are computed.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the checkpoint, and proves it as :func:`qops.load_model` does.

        Args:
            args: of the server; the config names the checkpoint.
        """
        self._backend: Any = importlib.import_module("triton_python_backend_utils")  # the server's own
        parameters = json.loads(args["model_config"])["parameters"]
        self._most = int(parameters["max_new_tokens"]["string_value"])
        self._model: Any = qops.load_model(parameters["checkpoint"]["string_value"]).eval()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers requests one by one.

        Args:
            requests: of the server.

        Returns:
            A response each.
        """
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        backend = self._backend
        try:
            tensors = [
                torch.from_numpy(backend.get_input_tensor_by_name(request, name).as_numpy())
                for name in ("input_ids", "new_tokens")
            ]
            output = backend.Tensor("output_ids", self._generate(tensors[0], int(tensors[1].item())).numpy())
        except (RuntimeError, ValueError, IndexError) as error:
            return backend.InferenceResponse(error=backend.TritonError(f"qops: {error}"))
        return backend.InferenceResponse(output_tensors=[output])

    def _generate(self, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
        vocabulary = self._model.config.get_text_config().vocab_size
        if not 1 <= new_tokens <= self._most:
            raise ValueError(f"new_tokens must be in 1 ... {self._most}, got {new_tokens}")
        if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ValueError(f"input_ids must be one or more in 0 ... {vocabulary - 1}, got {ids.tolist()}")
        ids = ids.to(self._model.device)
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return out[:, ids.shape[1] :].cpu()
