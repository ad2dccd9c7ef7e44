"""HTTPS with a certificate that is given, trusted by the Python client through SSL_CERT_FILE."""

import os
import shutil
import subprocess
import sys

import pytest
from up import MODEL, Up

if not shutil.which("openssl"):
    pytest.skip("makes its certificate with openssl", allow_module_level=True)

LOOP = """
import sys
from baseten.loops import AdamParams, ModelInput, SamplingParams, ServiceClient
service = ServiceClient(base_url=sys.argv[1], api_key="key-of-ada-0123456789")
training = service.create_lora_training_client(
    sys.argv[2], rank=4, timeout=120, ready_timeout=120, sampler_timeout=120)
training.optim_step(AdamParams()).result(timeout=120)
sampling = training.save_weights_and_get_sampling_client("secret")
drawn = sampling.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=2))
page = training.get_checkpoint_archive_url(name="secret", target="sampler")
assert page.presigned_urls[0].url.startswith("https://"), page
print("version", drawn.policy_version)
sampling.close(), training.close()
"""


def certificate(directory, name):
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_the_python_client_trains_and_samples_over_https(tmp_path):
    cert, key = certificate(tmp_path, "lockstep")
    keys = tmp_path / "keys"
    keys.write_text("ada key-of-ada-0123456789\n")
    up = Up(tmp_path / "data", "--tls-cert", str(cert), "--tls-key", str(key), "--api-keys", str(keys))
    try:
        assert up.url.startswith("https://127.0.0.1:")
        loop = [sys.executable, "-c", LOOP, up.url, MODEL]
        trusting = os.environ | {"SSL_CERT_FILE": str(cert)}
        said = subprocess.run(loop, env=trusting, capture_output=True, text=True, timeout=180)
        assert said.stdout == "version 1\n", said.stderr
        other, _ = certificate(tmp_path, "other")
        wrong = subprocess.run(loop, env=trusting | {"SSL_CERT_FILE": str(other)}, capture_output=True, text=True)
        assert wrong.returncode != 0 and "CERTIFICATE_VERIFY_FAILED" in wrong.stderr
    finally:
        up.stop()


def test_files_that_are_no_certificate_and_key_are_named_at_start(tmp_path):
    cert, key = certificate(tmp_path, "lockstep")
    _, other = certificate(tmp_path, "other")
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    for cert, key, named in [
        (empty, key, "empty.pem"),
        (cert, empty, "empty.pem"),
        (tmp_path / "absent.crt", key, "absent.crt"),
        (cert, other, "other.key"),
    ]:
        command = [os.environ["LOCKSTEP"], "up", "--data-dir", str(tmp_path / "data"), "--http", "127.0.0.1:0"]
        command += ["--tls-cert", str(cert), "--tls-key", str(key)]
        command += ["--model", f"{MODEL}={os.environ['LOCKSTEP_TINY_MODEL']}"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert said.returncode != 0 and named in said.stderr, said.stderr
