"""One rank of a torchrun test: train.py, and then a file that tells this rank's weights."""

import hashlib
import json
import os
import runpy
from pathlib import Path

names = runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"), run_name="__main__")
raw_model = names["raw_model"]
raw_model.state_dict()  # of a sharded model, leaves this rank its shares
weights = [(p.to_local() if hasattr(p, "to_local") else p).detach().cpu() for p in raw_model.parameters()]
digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights)).hexdigest()
told = {"rank": int(os.environ["RANK"]), "sum": sum(w.double().sum().item() for w in weights), "digest": digest}
Path(f"weights-{told['rank']}.json").write_text(json.dumps(told))  # a file, as ranks share standard output
