"""A parsed jinja2 template → the same with reports, where compiled templates do not ask their environment.

A report is a filter around an expression, or a statement at the start of a body. `sandbox` gives the filters.
"""

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

TURN, OPERAND, PRINTED, MADE = "a turn", "an operand", "printed", "made"
"""The filters that report; a template cannot write such names."""

_MAKING = (nodes.TemplateData, nodes.Output, nodes.List, nodes.Tuple, nodes.Dict)


class Instrumentation(NodeTransformer):
    """Report each turn of a loop, each call of a macro, and operations that are compiled to Python's own."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _turn(node))
        if node.test is not None:  # it runs for items that never reach the body, too
            counted = nodes.Filter(nodes.Const(1), TURN, [], [], None, None, lineno=node.lineno)
            node.test = nodes.And(nodes.Not(counted), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _turn(node))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_reported(part, PRINTED) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _reported(node.expr, OPERAND)
        for operand in node.ops:
            operand.expr = _reported(operand.expr, OPERAND)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _reported(node.key, OPERAND)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _reported(node, MADE) if isinstance(node.arg, nodes.Slice) else node


def _reported(node: nodes.Expr, name: str) -> nodes.Expr:
    if isinstance(node, nodes.Const):
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _turn(node: nodes.Node) -> nodes.Node:
    """Count the bytes that one turn of a body can make by itself: its text, lists, places in the output."""
    count = 0
    for inner in node.find_all(_MAKING):
        if isinstance(inner, nodes.TemplateData):
            count += 4 * len(inner.data)
        else:
            count += 64 + 100 * sum(1 for _ in inner.iter_child_nodes())
    turn = nodes.Filter(nodes.Const(count), TURN, [], [], None, None, lineno=node.lineno)
    return nodes.ExprStmt(turn, lineno=node.lineno)
