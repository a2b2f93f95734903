"""`python -m webapp`: the gateway with the settings of the environment."""

import configs
from webapp.server import run_gateway

run_gateway(configs.load())
