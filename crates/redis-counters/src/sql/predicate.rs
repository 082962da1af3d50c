//! WHERE: a tree of our own, made from the parser's, that holds the subset and nothing else.
//!
//! It prints itself as SQL with every parenthesis and quote in place. That print is what the definition's hash is
//! of, so that it does not change with formatting or with the parser's version, and what Postgres evaluates for
//! `verify`.

use std::fmt;

use change::Refusal;
use sqlparser::ast::{BinaryOperator, Expr, UnaryOperator};

use super::like::Pattern;
use super::literal::{Literal, quote_literal};
use super::scope::{Scope, quote_identifier};

/// Deeper nesting than this is refused, so that recursion is bounded. AND and OR chains are flat.
const MAX_DEPTH: usize = 100;

/// A condition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Predicate {
    All(Vec<Predicate>),
    Any(Vec<Predicate>),
    Not(Box<Predicate>),
    Compare {
        left: Operand,
        op: Comparison,
        right: Operand,
    },
    Between {
        operand: Operand,
        negated: bool,
        low: Operand,
        high: Operand,
    },
    In {
        column: String,
        negated: bool,
        list: Vec<Literal>,
    },
    Like {
        column: String,
        negated: bool,
        pattern: String,
        escape: Option<Option<char>>,
    },
    IsNull {
        column: String,
        negated: bool,
    },
    /// `IS [NOT] TRUE`, `FALSE`, `UNKNOWN`.
    Is {
        condition: Box<Predicate>,
        negated: bool,
        truth: Option<bool>,
    },
    /// A boolean column.
    Column(String),
    Constant(Option<bool>),
}

/// One side of a comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Operand {
    Column(String),
    Literal(Literal),
}

/// A comparison operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Comparison {
    fn of(op: &BinaryOperator) -> Option<Comparison> {
        Some(match op {
            BinaryOperator::Eq => Comparison::Equal,
            BinaryOperator::NotEq => Comparison::NotEqual,
            BinaryOperator::Lt => Comparison::Less,
            BinaryOperator::LtEq => Comparison::LessOrEqual,
            BinaryOperator::Gt => Comparison::Greater,
            BinaryOperator::GtEq => Comparison::GreaterOrEqual,
            _ => return None,
        })
    }

    /// Whether it asks for an order, and not only for equality.
    pub(crate) fn is_ordered(self) -> bool {
        !matches!(self, Comparison::Equal | Comparison::NotEqual)
    }

    /// What it makes of an order.
    pub(crate) fn holds(self, order: std::cmp::Ordering) -> bool {
        match self {
            Comparison::Equal => order.is_eq(),
            Comparison::NotEqual => order.is_ne(),
            Comparison::Less => order.is_lt(),
            Comparison::LessOrEqual => order.is_le(),
            Comparison::Greater => order.is_gt(),
            Comparison::GreaterOrEqual => order.is_ge(),
        }
    }

    fn sql(self) -> &'static str {
        match self {
            Comparison::Equal => "=",
            Comparison::NotEqual => "<>",
            Comparison::Less => "<",
            Comparison::LessOrEqual => "<=",
            Comparison::Greater => ">",
            Comparison::GreaterOrEqual => ">=",
        }
    }
}

impl Predicate {
    /// Takes a WHERE expression.
    pub(crate) fn of(scope: &Scope, expr: &Expr) -> Result<Predicate, Refusal> {
        Predicate::at(scope, expr, 0)
    }

    fn at(scope: &Scope, expr: &Expr, depth: usize) -> Result<Predicate, Refusal> {
        if depth > MAX_DEPTH {
            return Err(Refusal::new(
                format!("the WHERE clause is nested more than {MAX_DEPTH} deep"),
                "flatten it",
            ));
        }
        let inner = |expr: &Expr| Predicate::at(scope, expr, depth + 1);
        let truth = |expr: &Expr, negated, truth| {
            Ok(Predicate::Is { condition: Box::new(inner(expr)?), negated, truth })
        };
        match expr {
            Expr::Nested(nested) => inner(nested),
            Expr::BinaryOp { op: op @ (BinaryOperator::And | BinaryOperator::Or), .. } => {
                let parts: Result<_, _> = chain(expr, op).into_iter().map(inner).collect();
                Ok(if *op == BinaryOperator::And { Predicate::All(parts?) } else { Predicate::Any(parts?) })
            }
            Expr::BinaryOp { left, op, right } => match Comparison::of(op) {
                Some(op) => compare(scope, expr, left, op, right),
                None => Err(unsupported(expr)),
            },
            Expr::UnaryOp { op: UnaryOperator::Not, expr } => Ok(Predicate::Not(Box::new(inner(expr)?))),
            Expr::Between { expr: operand, negated, low, high } => Ok(Predicate::Between {
                operand: operand_of(scope, operand)?,
                negated: *negated,
                low: operand_of(scope, low)?,
                high: operand_of(scope, high)?,
            }),
            Expr::InList { expr: operand, list, negated } => in_list(scope, operand, list, *negated),
            Expr::Like { negated, any: false, expr: operand, pattern, escape_char } => {
                like(scope, operand, *negated, pattern, escape_char.as_deref())
            }
            Expr::IsNull(expr) => match scope.column(expr)? {
                Some(column) => Ok(Predicate::IsNull { column, negated: false }),
                None => truth(expr, false, None),
            },
            Expr::IsNotNull(expr) => match scope.column(expr)? {
                Some(column) => Ok(Predicate::IsNull { column, negated: true }),
                None => truth(expr, true, None),
            },
            Expr::IsTrue(expr) => truth(expr, false, Some(true)),
            Expr::IsNotTrue(expr) => truth(expr, true, Some(true)),
            Expr::IsFalse(expr) => truth(expr, false, Some(false)),
            Expr::IsNotFalse(expr) => truth(expr, true, Some(false)),
            Expr::IsUnknown(expr) => truth(expr, false, None),
            Expr::IsNotUnknown(expr) => truth(expr, true, None),
            _ => bare(scope, expr),
        }
    }

    /// Gives every column that the condition names to `visit`, repeatedly where it is named repeatedly.
    pub(crate) fn columns<'a>(&'a self, visit: &mut impl FnMut(&'a str)) {
        let mut operand = |operand: &'a Operand| {
            if let Operand::Column(name) = operand {
                visit(name);
            }
        };
        match self {
            Predicate::Compare { left, right, .. } => [left, right].into_iter().for_each(operand),
            Predicate::Between { operand: value, low, high, .. } => {
                [value, low, high].into_iter().for_each(&mut operand);
            }
            Predicate::All(parts) | Predicate::Any(parts) => {
                parts.iter().for_each(|part| part.columns(visit))
            }
            Predicate::Not(condition) | Predicate::Is { condition, .. } => condition.columns(visit),
            Predicate::In { column, .. }
            | Predicate::Like { column, .. }
            | Predicate::IsNull { column, .. }
            | Predicate::Column(column) => visit(column),
            Predicate::Constant(_) => {}
        }
    }
}

/// The parts of `a AND b AND c`, which the parser nests to the left, without recursion.
fn chain<'a>(expr: &'a Expr, wanted: &BinaryOperator) -> Vec<&'a Expr> {
    let mut parts = Vec::new();
    let mut rest = expr;
    while let Expr::BinaryOp { left, op, right } = rest
        && op == wanted
    {
        parts.push(right.as_ref());
        rest = left;
    }
    parts.push(rest);
    parts.reverse();
    parts
}

fn operand_of(scope: &Scope, expr: &Expr) -> Result<Operand, Refusal> {
    if let Some(column) = scope.column(expr)? {
        return Ok(Operand::Column(column));
    }
    Literal::of(expr)?.map(Operand::Literal).ok_or_else(|| unsupported(expr))
}

fn column_of(scope: &Scope, expr: &Expr) -> Result<String, Refusal> {
    scope.column(expr)?.ok_or_else(|| {
        Refusal::new(format!("{expr} is not a column"), "put a plain column to the left of IN and LIKE")
    })
}

fn compare(
    scope: &Scope,
    whole: &Expr,
    left: &Expr,
    op: Comparison,
    right: &Expr,
) -> Result<Predicate, Refusal> {
    let (left, right) = (operand_of(scope, left)?, operand_of(scope, right)?);
    if matches!((&left, &right), (Operand::Literal(_), Operand::Literal(_))) {
        return Err(Refusal::new(format!("{whole} compares two literals"), "write TRUE or FALSE instead"));
    }
    Ok(Predicate::Compare { left, op, right })
}

fn in_list(scope: &Scope, operand: &Expr, list: &[Expr], negated: bool) -> Result<Predicate, Refusal> {
    let column = column_of(scope, operand)?;
    let literal = |item: &Expr| {
        Literal::of(item)?.ok_or_else(|| {
            Refusal::new(
                format!("{item} in the IN list is not a literal"),
                "list literals only; compare with a column by = and join with OR",
            )
        })
    };
    let list = list.iter().map(literal).collect::<Result<_, _>>()?;
    Ok(Predicate::In { column, negated, list })
}

fn like(
    scope: &Scope,
    operand: &Expr,
    negated: bool,
    pattern: &Expr,
    escape: Option<&Expr>,
) -> Result<Predicate, Refusal> {
    let column = column_of(scope, operand)?;
    let text = |expr: &Expr| match Literal::of(expr)? {
        Some(Literal::Text(text)) => Ok(text),
        _ => Err(Refusal::new(
            format!("{expr} after LIKE or ESCAPE is not a plain string literal"),
            "write the pattern as '…'",
        )),
    };
    let pattern = text(pattern)?;
    let escape = match escape {
        None => None,
        Some(expr) => {
            let text = text(expr)?;
            let mut characters = text.chars();
            let first = characters.next();
            if characters.next().is_some() {
                return Err(Refusal::new(
                    format!("ESCAPE {expr} is longer than one character"),
                    "give one character, or '' for none",
                ));
            }
            Some(first)
        }
    };
    if Pattern::new(&pattern, escape.unwrap_or(Some('\\'))).is_none() {
        return Err(Refusal::new(
            format!("the LIKE pattern {} ends with its escape character", quote_literal(&pattern)),
            "double the escape character to match itself",
        ));
    }
    Ok(Predicate::Like { column, negated, pattern, escape })
}

/// What stands alone: a boolean column, TRUE, FALSE or NULL.
fn bare(scope: &Scope, expr: &Expr) -> Result<Predicate, Refusal> {
    if let Some(column) = scope.column(expr)? {
        return Ok(Predicate::Column(column));
    }
    match Literal::of(expr)? {
        Some(Literal::Boolean(value)) => Ok(Predicate::Constant(Some(value))),
        Some(Literal::Null) => Ok(Predicate::Constant(None)),
        Some(_) => Err(Refusal::new(format!("{expr} is not a condition"), "write TRUE or FALSE")),
        None => Err(unsupported(expr)),
    }
}

fn unsupported(expr: &Expr) -> Refusal {
    let what = match expr {
        Expr::Function(_) => "a function call",
        Expr::Subquery(_) | Expr::InSubquery { .. } | Expr::Exists { .. } => "a subquery",
        _ => "an expression",
    };
    Refusal::new(
        format!("{expr} is {what} that a counter's WHERE does not support"),
        "use comparisons of columns and literals (= <> < <= > >=), AND, OR, NOT, IN, BETWEEN, LIKE, IS [NOT] NULL, \
         TRUE, FALSE or UNKNOWN; compute anything else into a stored column of the table",
    )
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operand::Column(name) => f.write_str(&quote_identifier(name)),
            Operand::Literal(literal) => write!(f, "{literal}"),
        }
    }
}

impl fmt::Display for Predicate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |negated: bool| if negated { "NOT " } else { "" };
        let joined = |f: &mut fmt::Formatter<'_>, parts: &[Predicate], word: &str| {
            for (n, part) in parts.iter().enumerate() {
                write!(f, "{}({part})", if n == 0 { "" } else { word })?;
            }
            Ok(())
        };
        match self {
            Predicate::All(parts) => joined(f, parts, " AND "),
            Predicate::Any(parts) => joined(f, parts, " OR "),
            Predicate::Not(condition) => write!(f, "NOT ({condition})"),
            Predicate::Compare { left, op, right } => write!(f, "{left} {} {right}", op.sql()),
            Predicate::Between { operand, negated, low, high } => {
                write!(f, "{operand} {}BETWEEN {low} AND {high}", not(*negated))
            }
            Predicate::In { column, negated, list } => {
                let list: Vec<String> = list.iter().map(Literal::to_string).collect();
                write!(f, "{} {}IN ({})", quote_identifier(column), not(*negated), list.join(", "))
            }
            Predicate::Like { column, negated, pattern, escape } => {
                let column = quote_identifier(column);
                write!(f, "{column} {}LIKE {}", not(*negated), quote_literal(pattern))?;
                match escape {
                    None => Ok(()),
                    Some(None) => f.write_str(" ESCAPE ''"),
                    Some(Some(escape)) => write!(f, " ESCAPE {}", quote_literal(&escape.to_string())),
                }
            }
            Predicate::IsNull { column, negated } => {
                write!(f, "{} IS {}NULL", quote_identifier(column), not(*negated))
            }
            Predicate::Is { condition, negated, truth } => {
                let truth = match truth {
                    Some(true) => "TRUE",
                    Some(false) => "FALSE",
                    None => "UNKNOWN",
                };
                write!(f, "({condition}) IS {}{truth}", not(*negated))
            }
            Predicate::Column(name) => f.write_str(&quote_identifier(name)),
            Predicate::Constant(value) => f.write_str(match value {
                Some(true) => "TRUE",
                Some(false) => "FALSE",
                None => "NULL",
            }),
        }
    }
}
