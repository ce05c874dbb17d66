"""Both engines on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from tests.integration.real_models import real_model
from workers.engine import EngineRequest
from workers.engines.continuous import ContinuousEngine
from workers.engines.encoder import EncoderEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _chat(name: str, **body: object) -> EngineRequest:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "max_tokens": 16} | body
    return EngineRequest(id=name, endpoint="/v1/chat/completions", body=body)


def test_greedy_and_sampled_chats_share_a_batch() -> None:
    engine = ContinuousEngine(*real_model("smollm2-135m"))
    engine.start()
    assert engine._model.device.type == "cuda"
    greedy = [engine.submit(_chat(f"job_g{i}", temperature=0)) for i in range(4)]
    sampled = [
        engine.submit(_chat(f"job_s{i}", temperature=1.5, top_p=0.95, top_k=200)) for i in range(8)
    ]
    texts = {future.result(60).text for future in greedy}
    assert len(texts) == 1
    assert "Paris" in texts.pop()
    assert len({future.result(60).text for future in sampled}) > 1
    engine.stop()


def test_embeddings_agree_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    request = EngineRequest(id="job_e", endpoint="/v1/embeddings", body={"input": ["A river."]})
    vectors = []
    for place in ("cuda:0", "cpu"):
        monkeypatch.setattr("workers.engines.encoder.device", lambda at=place: torch.device(at))
        engine = EncoderEngine(*real_model("all-minilm-l6-v2"))
        engine.start()
        vectors.append(torch.tensor(engine.submit(request).result(60).vectors[0]))
        engine.stop()
    assert float(vectors[0] @ vectors[1]) >= 0.999
