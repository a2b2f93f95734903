"""KV in memory that peers cannot map, such as a GPU's: it moves through a bounce region, which the KV node serves.

    device KV  <--copies-->  slots of the bounce region  <--KVNode: shm, tcp, rdma-->  peers

Owns which transfer has which slots, and the copies. Must not know models, schedulers or requests.
"""
