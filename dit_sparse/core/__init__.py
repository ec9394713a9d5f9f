# SPDX-License-Identifier: Apache-2.0
"""What every other folder stands on: data, files and pages, and no idea of a model or a kernel."""
