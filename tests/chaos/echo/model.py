"""A model without an engine: as many responses as tokens were asked for, with the outputs that the harness reads.

It stands in the product's repository, so a server with it gets the same requests and sends about as many
responses; what such a server's memory does is Triton's doing.
"""

import json
import threading

import numpy as np
import triton_python_backend_utils as pb_utils

PAUSE_S = 0.01
"""Between two responses of a stream, about as with the real model."""


def _tensor(name, values, kind):
    return pb_utils.Tensor(name, np.array(values, dtype=kind))


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "sampling_parameters").as_numpy()[0]
            streaming = bool(pb_utils.get_input_tensor_by_name(request, "stream").as_numpy()[0])
            answer = (request.get_response_sender(), json.loads(text)["max_tokens"], streaming)
            threading.Thread(target=self._answer, args=answer, daemon=True).start()

    def _answer(self, sender, tokens, streaming):
        pause = threading.Event()
        pieces = [1] * tokens if streaming else [tokens]
        for at, count in enumerate(pieces):
            last = at == len(pieces) - 1
            pause.wait(PAUSE_S * count)
            outputs = [
                _tensor("text_output", ["word " * count], np.object_),
                _tensor("finish_reason", ["length" if last else "None"], np.object_),
                _tensor("num_output_tokens", [count], np.uint32),
                _tensor("morph_level", [0] * count, np.int32),
            ]
            response = pb_utils.InferenceResponse(outputs)
            sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)
