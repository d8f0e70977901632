"""Schemas of parts of Kubernetes manifests, and the check of a manifest by a schema."""

# The published fields: those used here and their neighbours.

TEXT, NUMBER, FLAG = str, int, bool
METADATA = {"name": TEXT, "annotations": {"*": TEXT}, "labels": {"*": TEXT}}
PROBE = {
    "tcpSocket": {"port": NUMBER},
    "httpGet": {"path": TEXT, "port": NUMBER},
    "exec": {"command": [TEXT]},
    "initialDelaySeconds": NUMBER,
    "periodSeconds": NUMBER,
    "timeoutSeconds": NUMBER,
    "failureThreshold": NUMBER,
}
CONTAINER = {
    "name": TEXT,
    "image": TEXT,
    "command": [TEXT],
    "args": [TEXT],
    "env": [
        {
            "name": TEXT,
            "value": TEXT,
            "valueFrom": {"secretKeyRef": {"name": TEXT, "key": TEXT, "optional": FLAG}},
        }
    ],
    "ports": [{"containerPort": NUMBER}],
    "readinessProbe": PROBE,
    "startupProbe": PROBE,
    "livenessProbe": PROBE,
    "resources": {"limits": {"*": (NUMBER, TEXT)}, "requests": {"*": (NUMBER, TEXT)}},
    "volumeMounts": [{"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}],
}
POD = {
    "restartPolicy": TEXT,
    "serviceAccountName": TEXT,
    "terminationGracePeriodSeconds": NUMBER,
    "nodeSelector": {"*": TEXT},
    "hostNetwork": FLAG,
    "containers": [CONTAINER],
    "volumes": [
        {
            "name": TEXT,
            "emptyDir": {"medium": TEXT, "sizeLimit": TEXT},
            "csi": {"driver": TEXT, "readOnly": FLAG, "volumeAttributes": {"*": TEXT}},
        }
    ],
}


def check(value, schema, path=""):
    """Asserts that all fields are in the schema with their types, where "*" matches any name."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{path}: {value!r} has no fields"
        for name, field in value.items():
            assert name in schema or "*" in schema, f"{path}.{name}: unknown field"
            check(field, schema.get(name, schema.get("*")), f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), f"{path}: {value!r} is not a list"
        for item in value:
            check(item, schema[0], f"{path}[]")
    else:
        number = schema is not NUMBER or not isinstance(value, bool)  # a bool is an int in Python
        assert number, f"{path}: {value!r} has the wrong type"
        assert isinstance(value, schema), f"{path}: {value!r} has the wrong type"
