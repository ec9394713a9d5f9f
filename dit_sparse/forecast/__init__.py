# SPDX-License-Identifier: Apache-2.0
"""What can be known before anything is computed: times, sizes, what this machine can do."""
