# SPDX-License-Identifier: Apache-2.0
"""What a person made of the tables, by model; Markdown."""

FINDINGS: dict[str, str] = {}
