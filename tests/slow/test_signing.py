"""A ledger's export signed with a key of one's own, by a tool of its own: `make signing-env` brings it."""

import subprocess

import pytest
from conftest import ROOT

BIN = ROOT / ".venv-signing/bin"


@pytest.mark.skipif(not BIN.exists(), reason="make signing-env")
def test_a_signed_export_is_refused_once_it_is_changed(tmp_path):
    """The commands of docs/ledger.md. The tool asks nobody when a key signs."""
    shown, key, public, signature = (tmp_path / name for name in ("shown", "key.pem", "key.pub.pem", "shown.sig"))
    shown.mkdir()
    (shown / "export.json").write_text('{"ledger": {"count": 3}}\n')
    make = ("from cryptography.hazmat.primitives import serialization as s\n"
            "from cryptography.hazmat.primitives.asymmetric import ec\n"
            "import pathlib, sys\n"
            "key = ec.generate_private_key(ec.SECP256R1())\n"
            "pathlib.Path(sys.argv[1]).write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, "
            "s.NoEncryption()))\n"
            "pathlib.Path(sys.argv[2]).write_bytes(key.public_key().public_bytes(s.Encoding.PEM, "
            "s.PublicFormat.SubjectPublicKeyInfo))\n")  # fmt: skip
    subprocess.run([BIN / "python", "-c", make, key, public], check=True)

    def tool(*words) -> subprocess.CompletedProcess:
        return subprocess.run([BIN / "model_signing", *words], capture_output=True, text=True)

    signed = tool("sign", "key", shown, "--private_key", key, "--signature", signature)
    assert signed.returncode == 0, signed.stderr
    verify = ("verify", "key", shown, "--public_key", public, "--signature", signature)
    assert tool(*verify).returncode == 0
    (shown / "export.json").write_text('{"ledger": {"count": 2}}\n')
    changed = tool(*verify)
    assert changed.returncode != 0 and "export.json" in changed.stdout + changed.stderr
