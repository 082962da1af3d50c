//! A definition against one version of its table: names become places, literals become values, and what could
//! make our comparison differ from Postgres's is refused.

use change::{Column, Columns, Encoding, Refusal, ReplicaIdentity, TableSchema};

use super::column_type::{Family, Type};
use super::decimal::Decimal;
use super::definition::{Aggregate, Definition};
use super::group::Form;
use super::like::Pattern;
use super::literal::Literal;
use super::predicate::{Comparison, Operand, Predicate};
use super::scope::{display_identifier, display_table, quote_identifier};
use super::value::Value;

const COMPARABLE: &str = "use a column of type boolean, smallint, integer, bigint, numeric, text, character varying, \
                          character, uuid, date, timestamp or timestamptz; IS NULL and count(column) take any type";

/// A definition, ready to evaluate on rows of one version of its table.
#[derive(Clone, Debug)]
pub struct Bound {
    pub(crate) definition: Definition,
    /// The columns that a row is asked for; everything else speaks of them by their place here.
    pub(crate) columns: Vec<BoundColumn>,
    /// The same, as they are found in a row.
    pub(crate) found: Columns,
    pub(crate) group: Vec<(usize, Type)>,
    /// How groups are written: as this version of the table prints them, until told otherwise.
    pub(crate) form: Form,
    /// The aggregate's column.
    pub(crate) measured: Option<usize>,
    pub(crate) filter: Option<Condition>,
}

#[derive(Clone, Debug)]
pub(crate) struct BoundColumn {
    /// Its name in a row; empty where rows do not have it, which reads as NULL.
    pub(crate) recorded: String,
    pub(crate) encoding: Encoding,
    /// Whether its type has a modifier, as `numeric(10,2)` has.
    pub(crate) modified: bool,
}

/// A [`Predicate`] with places and values in it.
#[derive(Clone, Debug)]
pub(crate) enum Condition {
    All(Vec<Condition>),
    Any(Vec<Condition>),
    Not(Box<Condition>),
    Compare { left: Side, op: Comparison, right: Side },
    In { column: Side, list: Vec<Side>, negated: bool },
    Like { column: usize, pattern: Pattern, negated: bool },
    IsNull { column: usize, negated: bool },
    Is { condition: Box<Condition>, truth: Option<bool>, negated: bool },
    Column(usize),
    Constant(Option<bool>),
}

/// One side of a comparison. Both sides read as the same variant of [`Value`].
#[derive(Clone, Debug)]
pub(crate) enum Side {
    Column { place: usize, read_as: Type },
    Literal(Option<Value<'static>>),
}

impl Definition {
    /// Resolves the query against a version of its table. Refuses what cannot be counted exactly.
    pub fn bind(&self, schema: &TableSchema) -> Result<Bound, Refusal> {
        let bound = self.bind_new_rows(schema)?;
        self.check_old_rows(schema).map(|()| bound)
    }

    /// The same, for rows that are new: those can be counted whatever a change tells of an old row.
    pub fn bind_new_rows(&self, schema: &TableSchema) -> Result<Bound, Refusal> {
        Binder { definition: self, schema }.bind().map_err(|refusal| self.named(refusal))
    }

    /// Refuses a version of the table of which an update or a delete does not tell all that the query looks at.
    pub(crate) fn check_old_rows(&self, schema: &TableSchema) -> Result<(), Refusal> {
        Binder { definition: self, schema }.check_identity().map_err(|refusal| self.named(refusal))
    }

    fn named(&self, refusal: Refusal) -> Refusal {
        Refusal::new(format!("counter \"{}\": {}", self.name(), refusal.what), refusal.remedy)
    }
}

impl Bound {
    /// The definition it was made from.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// The definition that a store's checkpoint has whose groups are written as this version of the table prints
    /// them: the [hash](Definition::hash), and the form of the groups where it is not the shortest.
    pub fn stamp(&self) -> String {
        self.form.stamp(self.definition.hash())
    }

    /// What rows call the columns that are looked at.
    pub(crate) fn recorded_columns(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.recorded.as_str())
    }

    /// The same, writing groups in this form.
    pub(crate) fn written_in(self, form: Form) -> Bound {
        Bound { form, ..self }
    }
}

struct Binder<'a> {
    definition: &'a Definition,
    schema: &'a TableSchema,
}

impl Binder<'_> {
    fn bind(&self) -> Result<Bound, Refusal> {
        let named = self.definition.referenced_columns();
        let columns = named.iter().map(|name| {
            let column = self.column(name)?;
            let modified = column.type_name.contains('(');
            let recorded = column.recorded_name().to_owned();
            Ok(BoundColumn { recorded, encoding: Encoding::of(column.type_oid), modified })
        });
        let columns = columns.collect::<Result<Vec<_>, Refusal>>()?;
        let group = self.definition.group_columns().iter().map(|name| self.group_column(name));
        let group = group.collect::<Result<Vec<_>, _>>()?;
        let grouped = self.definition.group_columns().iter().map(|name| self.column(name));
        let form = Form::of(grouped.collect::<Result<Vec<_>, _>>()?.into_iter());
        let measured = self.measured()?;
        let filter = self.definition.filter().map(|filter| self.condition(filter)).transpose()?;
        let found = Columns::new(columns.iter().map(|column| column.recorded.clone()));
        Ok(Bound { definition: self.definition.clone(), columns, found, group, form, measured, filter })
    }

    /// The table as one writes it in SQL.
    fn table(&self) -> String {
        display_table(self.schema)
    }

    fn column(&self, name: &str) -> Result<&Column, Refusal> {
        self.schema.columns.iter().find(|column| column.name == name).ok_or_else(|| {
            let known: Vec<_> = self.schema.columns.iter().map(|c| display_identifier(&c.name)).collect();
            Refusal::new(
                format!("table {} has no column {}", self.table(), display_identifier(name)),
                format!("name one of its columns: {}", known.join(", ")),
            )
        })
    }

    fn place(&self, name: &str) -> usize {
        let columns = self.definition.referenced_columns();
        columns.iter().position(|column| *column == name).expect("every column of the query is among them")
    }

    /// A change subtracts what the old row had added, so the old row must hold every column of the query.
    fn check_identity(&self) -> Result<(), Refusal> {
        if self.schema.identity == ReplicaIdentity::Full {
            return Ok(());
        }
        for name in self.definition.referenced_columns() {
            if self.column(name)?.key.is_none() {
                return Err(Refusal::new(
                    format!(
                        "column {} is not part of the replica identity of {}, so an update or a delete does not \
                         tell its old value",
                        display_identifier(name),
                        self.table()
                    ),
                    self.schema.make_full(&self.table()),
                ));
            }
        }
        Ok(())
    }

    fn group_column(&self, name: &str) -> Result<(usize, Type), Refusal> {
        let kind = self.comparable(name, false)?;
        if kind.family() == Family::Float {
            return Err(Refusal::new(
                format!("GROUP BY {} groups by floating-point numbers", display_identifier(name)),
                "group by an exact type: numeric, an integer type, or text",
            ));
        }
        Ok((self.place(name), kind))
    }

    fn measured(&self) -> Result<Option<usize>, Refusal> {
        let aggregate = self.definition.aggregate();
        let Some(name) = aggregate.column() else { return Ok(None) };
        let column = self.column(name)?;
        let summable = Type::of(column.type_oid).is_some_and(Type::is_integer);
        if matches!(aggregate, Aggregate::Sum { .. }) && !summable {
            return Err(Refusal::new(
                format!("sum({}) adds up type {}", display_identifier(name), column.type_name),
                "sum a column of type smallint, integer or bigint (for money: a count of its smallest unit); sums \
                 of numeric are not supported yet",
            ));
        }
        Ok(Some(self.place(name)))
    }

    /// The type of a column that is compared, if comparing is the same here as in Postgres.
    fn comparable(&self, name: &str, ordered: bool) -> Result<Type, Refusal> {
        let column = self.column(name)?;
        let shown = display_identifier(name);
        let Some(kind) = Type::of(column.type_oid) else {
            let what =
                format!("column {shown} has type {}, which a counter does not compare", column.type_name);
            return Err(Refusal::new(what, COMPARABLE));
        };
        if !kind.is_collated() {
            return Ok(kind);
        }
        let collation = column.collation.as_ref();
        let recollate = format!(
            "ALTER TABLE {} ALTER COLUMN {shown} TYPE {} COLLATE \"C\"",
            self.table(),
            column.type_name
        );
        if !collation.is_some_and(|collation| collation.deterministic) {
            return Err(Refusal::new(
                format!(
                    "column {shown} has {}, in which equal texts may differ",
                    collation.map_or("no known collation".to_owned(), |c| format!(
                        "the nondeterministic collation {}",
                        quote_identifier(&c.name)
                    ))
                ),
                recollate,
            ));
        }
        if let Some(collation) = collation.filter(|collation| ordered && !collation.bytewise) {
            return Err(Refusal::new(
                format!(
                    "column {shown} is compared by order, which its collation {} defines in a way that only \
                     Postgres knows",
                    quote_identifier(&collation.name)
                ),
                format!("use = , <> or IN, or: {recollate}"),
            ));
        }
        Ok(kind)
    }

    fn condition(&self, predicate: &Predicate) -> Result<Condition, Refusal> {
        let all = |parts: &[Predicate]| -> Result<Vec<Condition>, Refusal> {
            parts.iter().map(|part| self.condition(part)).collect()
        };
        Ok(match predicate {
            Predicate::All(parts) => Condition::All(all(parts)?),
            Predicate::Any(parts) => Condition::Any(all(parts)?),
            Predicate::Not(inner) => Condition::Not(Box::new(self.condition(inner)?)),
            Predicate::Compare { left, op, right } => self.compare(left, *op, right)?,
            Predicate::Between { operand, negated, low, high } => {
                let low = self.compare(operand, Comparison::GreaterOrEqual, low)?;
                let high = self.compare(operand, Comparison::LessOrEqual, high)?;
                let both = Condition::All(vec![low, high]);
                if *negated { Condition::Not(Box::new(both)) } else { both }
            }
            Predicate::In { column, negated, list } => self.in_list(column, list, *negated)?,
            Predicate::Like { column, negated, pattern, escape } => {
                self.like(column, pattern, escape.unwrap_or(Some('\\')), *negated)?
            }
            Predicate::IsNull { column, negated } => {
                Condition::IsNull { column: self.place(column), negated: *negated }
            }
            Predicate::Is { condition, negated, truth } => Condition::Is {
                condition: Box::new(self.condition(condition)?),
                truth: *truth,
                negated: *negated,
            },
            Predicate::Column(name) => self.boolean_column(name)?,
            Predicate::Constant(value) => Condition::Constant(*value),
        })
    }

    fn boolean_column(&self, name: &str) -> Result<Condition, Refusal> {
        let column = self.column(name)?;
        if Type::of(column.type_oid) == Some(Type::Boolean) {
            return Ok(Condition::Column(self.place(name)));
        }
        Err(Refusal::new(
            format!(
                "column {} stands as a condition but has type {}",
                display_identifier(name),
                column.type_name
            ),
            "compare it with a value",
        ))
    }

    fn like(
        &self,
        name: &str,
        pattern: &str,
        escape: Option<char>,
        negated: bool,
    ) -> Result<Condition, Refusal> {
        let kind = self.comparable(name, false)?;
        if !kind.is_collated() {
            return Err(Refusal::new(
                format!("LIKE is applied to column {} of type {kind}", display_identifier(name)),
                "apply LIKE to text",
            ));
        }
        let pattern = Pattern::new(pattern, escape)
            .ok_or_else(|| Refusal::new("a LIKE pattern ends with its escape character", "double it"))?;
        Ok(Condition::Like { column: self.place(name), pattern, negated })
    }

    fn compare(&self, left: &Operand, op: Comparison, right: &Operand) -> Result<Condition, Refusal> {
        let ordered = op.is_ordered();
        let (left, right) = match (left, right) {
            (Operand::Column(left), Operand::Column(right)) => self.two_columns(left, right, ordered)?,
            (Operand::Column(name), Operand::Literal(literal)) => {
                self.with_literal(name, literal, ordered)?
            }
            (Operand::Literal(literal), Operand::Column(name)) => {
                let (column, literal) = self.with_literal(name, literal, ordered)?;
                (literal, column)
            }
            (Operand::Literal(left), Operand::Literal(right)) => {
                let what = format!("{left} is compared with {right}, a literal too");
                return Err(Refusal::new(what, "compare with a column"));
            }
        };
        Ok(Condition::Compare { left, op, right })
    }

    fn two_columns(&self, left: &str, right: &str, ordered: bool) -> Result<(Side, Side), Refusal> {
        let (a, b) = (self.comparable(left, ordered)?, self.comparable(right, ordered)?);
        let collation = |name| self.column(name).map(|column| column.collation.as_ref());
        let shown = || (display_identifier(left), display_identifier(right));
        if a.family() != b.family() {
            let (left, right) = shown();
            return Err(Refusal::new(
                format!("column {left} of type {a} is compared with column {right} of type {b}"),
                "compare columns of the same kind of type",
            ));
        }
        if a.is_collated() && collation(left)? != collation(right)? {
            let (left, right) = shown();
            return Err(Refusal::new(
                format!("columns {left} and {right} have different collations"),
                "give both the same collation, or compare each with a literal",
            ));
        }
        let numeric = [a, b].contains(&Type::Numeric);
        let side = |name, kind| Side::Column {
            place: self.place(name),
            read_as: if numeric { Type::Numeric } else { kind },
        };
        Ok((side(left, a), side(right, b)))
    }

    fn with_literal(&self, name: &str, literal: &Literal, ordered: bool) -> Result<(Side, Side), Refusal> {
        let (column, mut literals) = self.with_literals(name, std::slice::from_ref(literal), ordered)?;
        let literal = literals.pop().flatten();
        Ok((column, Side::Literal(literal)))
    }

    /// The column and the literals, all read as one type: an exact number is numeric if any of them is.
    fn with_literals(
        &self,
        name: &str,
        literals: &[Literal],
        ordered: bool,
    ) -> Result<(Side, Vec<Option<Value<'static>>>), Refusal> {
        let kind = self.comparable(name, ordered)?;
        let value = |literal: &Literal| {
            literal.value_for(kind).map_err(|why| {
                let what = format!("beside column {}: {why}", display_identifier(name));
                Refusal::new(what, format!("write a value of type {kind} in place of {literal}"))
            })
        };
        let mut values = literals.iter().map(value).collect::<Result<Vec<_>, _>>()?;
        let numeric =
            kind == Type::Numeric || values.iter().flatten().any(|v| matches!(v, Value::Numeric(_)));
        if numeric {
            values.iter_mut().flatten().for_each(make_numeric);
        }
        let read_as = if numeric { Type::Numeric } else { kind };
        Ok((Side::Column { place: self.place(name), read_as }, values))
    }

    fn in_list(&self, name: &str, list: &[Literal], negated: bool) -> Result<Condition, Refusal> {
        if self.comparable(name, false)?.family() == Family::Float {
            return Err(Refusal::new(
                format!("column {} is floating-point and stands before IN", display_identifier(name)),
                "write comparisons joined by OR: with IN, Postgres rounds the values differently",
            ));
        }
        let (column, values) = self.with_literals(name, list, false)?;
        Ok(Condition::In { column, list: values.into_iter().map(Side::Literal).collect(), negated })
    }
}

fn make_numeric(value: &mut Value<'static>) {
    if let Value::Integer(integer) = value {
        let numeric = Decimal::parse_literal(&integer.to_string());
        *value = Value::Numeric(numeric.expect("an integer's digits are a number"));
    }
}
