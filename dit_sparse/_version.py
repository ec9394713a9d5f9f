# SPDX-License-Identifier: Apache-2.0
"""The version of this package, read by setuptools without importing it."""

__version__ = "0.1.0"
