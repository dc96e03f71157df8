"""What proposes captions in tests: a tiny BLIP with random weights, and an endpoint that answers like OpenAI's."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "dog", "cat", "beach", "on", "the", "sun"]


def tiny_blip(folder: Path) -> Path:
    """A folder as `save_pretrained` writes it: BLIP of two layers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3}
    config = BlipConfig(
        text_config={
            **sizes,
            **ends,
            "vocab_size": len(WORDS),
            "encoder_hidden_size": 16,
            "max_position_embeddings": 96,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


class Endpoint:
    """Chat completions on loopback: says of each picture how wide it is. With `key` it asks for that one."""

    def __init__(self, key: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.refuse = False
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append({"path": self.path, **body})
                status, answer = endpoint.answer(body, self.headers.get("Authorization"), key)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *about: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any], sent: str | None, key: str | None) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        if key is not None and sent != f"Bearer {key}":
            return 401, {"error": {"message": "wrong key"}}
        if self.refuse:
            return 503, {"error": {"message": "the model is loading"}}
        url = body["messages"][0]["content"][1]["image_url"]["url"]
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
        said = f' "A dog before something of {picture.width} px.\n" '
        return 200, {"choices": [{"message": {"role": "assistant", "content": said}}]}

    def close(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()
