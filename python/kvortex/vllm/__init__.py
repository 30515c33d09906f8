"""KVortex as a KV connector of vLLM.

``--kv-transfer-config '{"kv_connector": "KVortexConnector", "kv_connector_module_path": "kvortex.vllm",
"kv_role": "kv_both"}'`` is all that it takes; docs/vllm.md says the rest.
"""

from kvortex.vllm.connector import KVortexConnector

__all__ = ["KVortexConnector"]
