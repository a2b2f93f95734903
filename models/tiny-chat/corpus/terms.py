"""Words of LLM serving: term -> (definition, why it matters)."""

TERMS = {
    "prefill": (
        "Prefill is the phase that reads the whole prompt in one pass and fills the KV cache",
        "It is limited by compute and it decides the time to first token",
    ),
    "decode": (
        "Decode is the phase that produces the answer one token at a time, reading the KV cache at every step",
        "It is limited by memory bandwidth, so many requests are decoded together",
    ),
    "the KV cache": (
        "The KV cache stores the attention keys and values of all earlier tokens so they are not computed again",
        "It grows with every token and usually fills most of the GPU memory",
    ),
    "continuous batching": (
        "Continuous batching lets requests join and leave the running batch at every step",
        "It keeps the GPU busy because short answers do not wait for long ones",
    ),
    "TTFT": (
        "TTFT is the time to first token, the delay between sending a request and seeing its first token",
        "It depends on the queue and on prefill",
    ),
    "TPOT": ("TPOT is the time per output token after the first one", "It depends on decode and on the batch size"),
    "ITL": (
        "ITL is the inter-token latency, the gap between two neighbouring output tokens",
        "A large gap is seen by the user as a pause",
    ),
    "disaggregation": (
        "Disaggregation runs prefill and decode on different workers and sends the KV cache between them",
        "Long prompts then no longer disturb requests that are being decoded",
    ),
    "RDMA": (
        "RDMA is remote direct memory access, which moves data between machines without using their CPUs",
        "It gives a fast path for sending the KV cache",
    ),
    "Redis": (
        "Redis is an in-memory data store used as a cache, a queue and a message broker",
        "It is fast because it keeps its data in memory",
    ),
    "Celery": (
        "Celery is a Python library that runs tasks in background workers fed by a message queue",
        "It keeps slow work away from the web server",
    ),
    "a message queue": (
        "A message queue holds work until a worker is ready to take it",
        "It smooths out bursts of requests",
    ),
    "a worker": (
        "A worker is a process that takes requests from a queue and runs the model on them",
        "Adding workers adds capacity",
    ),
    "a router": (
        "A router chooses which worker should handle each request",
        "A good router sends a prompt to the worker that already holds its prefix",
    ),
    "prefix caching": (
        "Prefix caching keeps the KV cache of shared prompt beginnings so they are computed only once",
        "It makes repeated system prompts almost free",
    ),
    "paged attention": (
        "Paged attention stores the KV cache in small blocks that can be anywhere in memory",
        "It avoids wasting memory on space that is never used",
    ),
    "chunked prefill": (
        "Chunked prefill splits a long prompt into pieces and mixes them with decode steps",
        "It keeps the token stream smooth while a long prompt is read",
    ),
    "a token": (
        "A token is a small piece of text, such as a word or a part of a word, with its own number",
        "Models read and write tokens and not letters",
    ),
    "a tokenizer": (
        "A tokenizer turns text into token numbers and turns token numbers back into text",
        "The same tokenizer must be used for training and for serving",
    ),
    "throughput": (
        "Throughput is the number of tokens or requests that a server finishes per second",
        "It usually grows with the batch size",
    ),
    "latency": ("Latency is the time a user waits for a result", "Low latency makes a chat feel alive"),
    "a batch": ("A batch is a group of requests that are processed together", "Larger batches use the GPU better"),
    "tensor parallelism": (
        "Tensor parallelism splits every layer of a model over several GPUs",
        "It makes room for models that do not fit on one GPU",
    ),
    "pipeline parallelism": (
        "Pipeline parallelism gives each GPU a different group of layers",
        "It needs little communication between GPUs",
    ),
    "speculative decoding": (
        "Speculative decoding lets a small model guess tokens that the large model then checks in one pass",
        "It gives the same answers in fewer steps",
    ),
    "quantization": ("Quantization stores model weights with fewer bits", "It saves memory and bandwidth"),
    "temperature": (
        "Temperature controls how random sampling is, and zero means that the best token is always taken",
        "Low values give stable answers",
    ),
    "top-p sampling": (
        "Top-p sampling picks from the smallest set of tokens whose probabilities add up to p",
        "It cuts off unlikely tokens",
    ),
    "greedy decoding": (
        "Greedy decoding always picks the token with the highest score",
        "It gives the same answer every time",
    ),
    "attention": (
        "Attention lets each token look at earlier tokens and mix in what it needs",
        "It is how a model remembers the context",
    ),
    "a transformer": (
        "A transformer is a neural network made of attention layers and feed-forward layers",
        "Most language models are transformers",
    ),
    "a language model": (
        "A language model is a program that predicts the next token of a text",
        "It writes answers by predicting again and again",
    ),
    "an embedding": (
        "An embedding is a list of numbers that stands for a token",
        "Similar tokens have similar embeddings",
    ),
    "a GPU": (
        "A GPU is a processor that runs thousands of simple calculations at the same time",
        "It is much faster than a CPU for matrix products",
    ),
    "GPU memory": ("GPU memory holds the model weights and the KV cache", "When it is full, new requests must wait"),
    "a context window": (
        "A context window is the largest number of tokens that a model can read at once",
        "Older text must be dropped when it is full",
    ),
    "streaming": (
        "Streaming sends each token to the user as soon as it is ready",
        "The user can start reading before the answer is finished",
    ),
    "a load balancer": (
        "A load balancer spreads requests evenly over several servers",
        "It keeps any one server from being overloaded",
    ),
    "backpressure": (
        "Backpressure tells senders to slow down when a system is full",
        "It prevents queues from growing without end",
    ),
    "a health check": (
        "A health check asks a service whether it is still able to work",
        "Broken workers are found and replaced",
    ),
    "preemption": (
        "Preemption pauses a running request to free memory for others",
        "The paused request continues later",
    ),
    "a scheduler": ("A scheduler decides which requests run in the next step", "It balances speed and fairness"),
    "an API server": (
        "An API server receives requests over HTTP and returns the answers",
        "It hides the workers from the users",
    ),
    "a system prompt": (
        "A system prompt is a text that tells the model how to behave",
        "It comes before the first user message",
    ),
    "tool calling": (
        "Tool calling lets a model ask a program to run a function and then use the result",
        "It gives the model access to fresh facts",
    ),
    "JSON": (
        "JSON is a text format for data made of objects, lists, strings and numbers",
        "Programs can read it easily",
    ),
    "a checkpoint": ("A checkpoint is a saved copy of the model weights", "Training can continue from it after a stop"),
    "NVLink": (
        "NVLink is a fast connection between GPUs in one machine",
        "It moves the KV cache much faster than a network",
    ),
    "TCP": (
        "TCP is a network protocol that delivers bytes in order and without loss",
        "It works everywhere but uses the CPU",
    ),
    "goodput": (
        "Goodput is the number of requests per second that meet their latency goals",
        "It matters more than raw throughput",
    ),
    "a KV block": (
        "A KV block is a fixed number of token positions in the KV cache",
        "Blocks can be shared between requests",
    ),
    "eviction": (
        "Eviction removes old data from a cache to make room for new data",
        "The least recently used block usually goes first",
    ),
}
