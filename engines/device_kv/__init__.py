"""KV in memory that peers cannot map, such as a GPU's: through a bounce region, or over rdma at its own addresses.

    device KV  <--copies-->  slots of the bounce region  <--KVNode: shm, tcp, rdma-->  peers        BouncedNode
    device KV  <--KVNode: rdma alone-->  peers                                                      DirectNode

Owns which transfer has which slots, the copies, and digests of pages where they lie. Must not know models, schedulers
or requests.
"""
