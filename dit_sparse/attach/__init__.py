# SPDX-License-Identifier: Apache-2.0
"""Put a strategy on a pipeline, run it call by call, and report what ran."""
