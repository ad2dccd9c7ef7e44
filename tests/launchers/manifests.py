"""Holds Kubernetes manifests against the schemas of Kubernetes, unknown fields refused.

A JobSet is no resource of Kubernetes itself: each of its jobs is checked as the Job that it stands for.
"""

import sys

import kubernetes_validate
import yaml

VERSION = "1.33"


def resources(document):
    if document["kind"] != "JobSet":
        yield document
        return
    for job in document["spec"]["replicatedJobs"]:
        template = job["template"]
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, "spec": template["spec"]}


for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        documents = list(yaml.safe_load_all(file))
    assert documents, f"{path} is empty"
    for document in documents:
        for resource in resources(document):
            kubernetes_validate.validate(resource, VERSION, strict=True)
            print(f"{path}: {resource['kind']} {resource['metadata']['name']}")
