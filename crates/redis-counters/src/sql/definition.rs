//! A counter's query, parsed and reduced to the subset. What is not in the subset is refused by its name.

use change::Refusal;
use sqlparser::ast::{
    Distinct, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr, Query, Select,
    SelectFlavor, SelectItem, SetExpr, Statement, TableFactor,
};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use xxhash_rust::xxh3::xxh3_128;

use super::predicate::Predicate;
use super::scope::{Scope, fold, quote_identifier, table_name};

/// Part of every hash: raised when the same SQL would come to mean something else in the store.
const MEANING: u32 = 1;
/// Longest query, in bytes. With it the parser's recursion and ours are bounded.
const MAX_SQL_BYTES: usize = 16 * 1024;
/// Most columns that a query may name, so that a row's evaluation needs no heap for their names.
pub(crate) const MAX_COLUMNS: usize = 32;

const SUBSET: &str = "write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table \
                      [WHERE condition] [GROUP BY the group columns]";

/// What is counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Aggregate {
    /// `count(*)`.
    CountRows,
    /// `count(column)`: rows in which the column is not NULL.
    Count {
        /// The column.
        column: String,
    },
    /// `sum(column)`, NULL when no row has a value.
    Sum {
        /// The column.
        column: String,
    },
}

impl Aggregate {
    /// The column it reads, if any.
    pub fn column(&self) -> Option<&str> {
        match self {
            Aggregate::CountRows => None,
            Aggregate::Count { column } | Aggregate::Sum { column } => Some(column),
        }
    }

    pub(crate) fn sql(&self) -> String {
        match self {
            Aggregate::CountRows => "count(*)".to_owned(),
            Aggregate::Count { column } => format!("count({})", quote_identifier(column)),
            Aggregate::Sum { column } => format!("sum({})", quote_identifier(column)),
        }
    }
}

/// A counter's name and query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Definition {
    name: String,
    sql: String,
    schema: String,
    table: String,
    group: Vec<String>,
    aggregate: Aggregate,
    filter: Option<Predicate>,
}

impl Definition {
    /// Parses a query. Refuses what a counter cannot be, naming the fragment and the remedy.
    pub fn parse(name: &str, sql: &str) -> Result<Definition, Refusal> {
        reduce(name, sql)
            .map_err(|refusal| Refusal::new(format!("counter \"{name}\": {}", refusal.what), refusal.remedy))
    }

    /// Its name in the configuration and in Redis.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The query as it was given.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// The table's schema and name.
    pub fn table(&self) -> (&str, &str) {
        (&self.schema, &self.table)
    }

    /// Whether there is a GROUP BY: a hash with a field per group, else a single value.
    pub fn grouped(&self) -> bool {
        !self.group.is_empty()
    }

    /// The columns of GROUP BY, in its order, which is also the order of their values in a hash field.
    pub fn group_columns(&self) -> &[String] {
        &self.group
    }

    /// What is counted.
    pub fn aggregate(&self) -> &Aggregate {
        &self.aggregate
    }

    pub(crate) fn filter(&self) -> Option<&Predicate> {
        self.filter.as_ref()
    }

    /// Every column that the query names, once. The old row must hold them all.
    pub fn referenced_columns(&self) -> Vec<&str> {
        let mut columns: Vec<&str> = Vec::new();
        let mut add = |name| {
            if !columns.contains(&name) {
                columns.push(name);
            }
        };
        self.group.iter().map(String::as_str).chain(self.aggregate.column()).for_each(&mut add);
        if let Some(filter) = &self.filter {
            filter.columns(&mut add);
        }
        columns
    }

    /// Names what the query means: the same for every way to lay it out, another for every other query of the
    /// subset. 32 hexadecimal digits. What a checkpoint has is the [stamp](super::Bound::stamp), which adds how the
    /// groups are written.
    pub fn hash(&self) -> String {
        format!("{:032x}", xxh3_128(format!("{MEANING} {}", self.canonical()).as_bytes()))
    }

    /// The query in one fixed form.
    pub(crate) fn canonical(&self) -> String {
        let group: Vec<String> = self.group.iter().map(|name| quote_identifier(name)).collect();
        let mut sql = String::from("SELECT ");
        for column in &group {
            sql += column;
            sql += ", ";
        }
        sql += &self.aggregate.sql();
        sql += &format!(" FROM {}.{}", quote_identifier(&self.schema), quote_identifier(&self.table));
        if let Some(filter) = &self.filter {
            sql += &format!(" WHERE {filter}");
        }
        if !group.is_empty() {
            sql += &format!(" GROUP BY {}", group.join(", "));
        }
        sql
    }
}

fn reduce(name: &str, sql: &str) -> Result<Definition, Refusal> {
    if sql.len() > MAX_SQL_BYTES {
        return Err(Refusal::new(format!("the query is longer than {MAX_SQL_BYTES} bytes"), "shorten it"));
    }
    let mut statements = Parser::parse_sql(&PostgreSqlDialect {}, sql)
        .map_err(|error| Refusal::new(format!("not SQL that can be read: {error}"), SUBSET))?;
    let query = match (statements.pop(), statements.is_empty()) {
        (Some(Statement::Query(query)), true) => query,
        (Some(_), true) => return Err(Refusal::new("the statement is not a SELECT", SUBSET)),
        (None, _) => return Err(Refusal::new("the query is empty", SUBSET)),
        (Some(_), false) => return Err(Refusal::new("there is more than one statement", "give one query")),
    };
    let select = only_select(*query)?;
    let scope = only_table(&select)?;
    let (columns, aggregate) = select_list(&scope, &select.projection)?;
    let group = group_columns(&scope, &select.group_by)?;
    if columns != group {
        return Err(group_mismatch(&columns, &group));
    }
    let filter = select.selection.as_ref().map(|expr| Predicate::of(&scope, expr)).transpose()?;
    let Scope { schema, table, .. } = scope;
    let (name, sql) = (name.to_owned(), sql.to_owned());
    let definition = Definition { name, sql, schema, table, group, aggregate, filter };
    if definition.referenced_columns().len() > MAX_COLUMNS {
        return Err(Refusal::new(format!("the query names more than {MAX_COLUMNS} columns"), "name fewer"));
    }
    Ok(definition)
}

/// Refuses the first of the clauses that is there.
fn refuse_any(clauses: impl IntoIterator<Item = (bool, String)>) -> Result<(), Refusal> {
    match clauses.into_iter().find(|(present, _)| *present) {
        Some((_, clause)) => {
            let remedy = format!("remove it; {SUBSET}");
            Err(Refusal::new(format!("{clause} is not part of what a counter can be"), remedy))
        }
        None => Ok(()),
    }
}

/// The SELECT of a query that has nothing around it. The pattern names every field, so that a new one of the
/// parser's cannot pass unseen.
fn only_select(query: Query) -> Result<Select, Refusal> {
    let Query {
        with,
        body,
        order_by,
        limit_clause,
        fetch,
        locks,
        for_clause,
        settings,
        format_clause,
        pipe_operators,
    } = query;
    refuse_any([
        (with.is_some(), "WITH".to_owned()),
        (order_by.is_some(), show(order_by.as_ref())),
        (limit_clause.is_some(), show(limit_clause.as_ref()).trim().to_owned()),
        (fetch.is_some(), show(fetch.as_ref())),
        (!locks.is_empty(), "FOR UPDATE or FOR SHARE".to_owned()),
        (
            for_clause.is_some() || settings.is_some() || format_clause.is_some(),
            "a clause at the end".to_owned(),
        ),
        (!pipe_operators.is_empty(), "|>".to_owned()),
    ])?;
    let select = match *body {
        SetExpr::Select(select) => *select,
        SetExpr::SetOperation { op, .. } => {
            return Err(Refusal::new(format!("{op} is not part of what a counter can be"), SUBSET));
        }
        SetExpr::Query(query) => return only_select(*query),
        other => return Err(Refusal::new(format!("{other} is not a SELECT"), SUBSET)),
    };
    refuse_clauses(&select)?;
    Ok(select)
}

fn refuse_clauses(select: &Select) -> Result<(), Refusal> {
    let Select {
        select_token: _,
        optimizer_hints: _, // Comments.
        distinct,
        select_modifiers,
        top,
        top_before_distinct: _,
        projection: _,
        exclude,
        into,
        from: _,
        lateral_views,
        prewhere,
        selection: _,
        connect_by,
        group_by: _,
        cluster_by,
        distribute_by,
        sort_by,
        having,
        named_window,
        qualify,
        window_before_qualify: _,
        value_table_mode,
        flavor,
    } = select;
    let distinct = distinct.as_ref().filter(|distinct| **distinct != Distinct::All);
    let foreign = select_modifiers.is_some()
        || top.is_some()
        || exclude.is_some()
        || !lateral_views.is_empty()
        || prewhere.is_some()
        || !connect_by.is_empty()
        || !cluster_by.is_empty()
        || !distribute_by.is_empty()
        || !sort_by.is_empty()
        || qualify.is_some()
        || value_table_mode.is_some()
        || *flavor != SelectFlavor::Standard;
    refuse_any([
        (distinct.is_some(), show(distinct)),
        (into.is_some(), show(into.as_ref())),
        (having.is_some(), format!("HAVING {}", show(having.as_ref()))),
        (!named_window.is_empty(), "WINDOW".to_owned()),
        (foreign, "a clause that Postgres does not know".to_owned()),
    ])
}

fn show(clause: Option<&impl std::fmt::Display>) -> String {
    clause.map(|clause| clause.to_string()).unwrap_or_default()
}

fn only_table(select: &Select) -> Result<Scope, Refusal> {
    let not_a_table = |what: String| Refusal::new(what, "name one table after FROM, without a join");
    let [from] = select.from.as_slice() else {
        return Err(not_a_table(format!("FROM names {} tables and not one", select.from.len())));
    };
    if let Some(join) = from.joins.first() {
        return Err(not_a_table(format!("{} is a join", join.to_string().trim())));
    }
    let TableFactor::Table {
        name,
        alias,
        args: None,
        with_hints,
        version: None,
        with_ordinality: false,
        partitions,
        json_path: None,
        sample: None,
        index_hints,
    } = &from.relation
    else {
        return Err(not_a_table(format!("{} is not a plain table", from.relation)));
    };
    if !with_hints.is_empty() || !partitions.is_empty() || !index_hints.is_empty() {
        return Err(not_a_table(format!("{} is not a plain table", from.relation)));
    }
    let (schema, table) = table_name(name)?;
    let alias = match alias {
        Some(alias) if !alias.columns.is_empty() || alias.at.is_some() => {
            return Err(not_a_table(format!("{} renames columns", from.relation)));
        }
        Some(alias) => Some(fold(&alias.name)?),
        None => None,
    };
    Ok(Scope { schema, table, alias })
}

/// The plain columns, in order, and the one aggregate, wherever it stands.
fn select_list(scope: &Scope, items: &[SelectItem]) -> Result<(Vec<String>, Aggregate), Refusal> {
    let mut columns = Vec::new();
    let mut found: Option<Aggregate> = None;
    for item in items {
        let expr = match item {
            SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. } => expr,
            _ => return Err(Refusal::new(format!("{item} in the select list is not one column"), SUBSET)),
        };
        if let Some(column) = scope.column(expr)? {
            columns.push(column);
            continue;
        }
        let Expr::Function(function) = expr else {
            let what = format!("{expr} in the select list is neither a column nor an aggregate");
            return Err(Refusal::new(what, SUBSET));
        };
        if found.replace(aggregate(scope, function)?).is_some() {
            let what = format!("{expr} is a second aggregate");
            return Err(Refusal::new(what, "define a counter of its own for each aggregate"));
        }
    }
    let aggregate = found.ok_or_else(|| Refusal::new("the select list has no aggregate", SUBSET))?;
    Ok((columns, aggregate))
}

fn aggregate(scope: &Scope, function: &Function) -> Result<Aggregate, Refusal> {
    let refused = |remedy: &str| Err(Refusal::new(format!("{function} is not supported"), remedy));
    let Function { name, uses_odbc_syntax, parameters, args, within_group, filter, null_treatment, over } =
        function;
    if filter.is_some() {
        return refused("put the condition of FILTER into WHERE");
    }
    if over.is_some() {
        return refused("remove OVER: a counter has no window");
    }
    let FunctionArguments::List(list) = args else { return refused(SUBSET) };
    if list.duplicate_treatment.is_some() {
        return refused("remove DISTINCT or ALL: a counter does not remember single values");
    }
    let plain = !*uses_odbc_syntax
        && matches!(parameters, FunctionArguments::None)
        && within_group.is_empty()
        && null_treatment.is_none()
        && list.clauses.is_empty();
    let [FunctionArg::Unnamed(argument)] = list.args.as_slice() else { return refused(SUBSET) };
    if !plain {
        return refused(SUBSET);
    }
    let function_name = match name.0.as_slice() {
        [part] => part.as_ident().map(fold).transpose()?,
        _ => None,
    };
    match (function_name.as_deref(), argument) {
        (Some("count"), FunctionArgExpr::Wildcard) => Ok(Aggregate::CountRows),
        (Some("count" | "sum"), FunctionArgExpr::Expr(expr)) => match scope.column(expr)? {
            Some(column) if function_name.as_deref() == Some("count") => Ok(Aggregate::Count { column }),
            Some(column) => Ok(Aggregate::Sum { column }),
            None => refused("give a plain column, or count(*) for rows"),
        },
        _ => refused("use count(*), count(column) or sum(column)"),
    }
}

fn group_columns(scope: &Scope, group_by: &GroupByExpr) -> Result<Vec<String>, Refusal> {
    let refused = |what: String| Refusal::new(what, "list plain columns in GROUP BY, by their names");
    let expressions = match group_by {
        GroupByExpr::Expressions(expressions, modifiers) if modifiers.is_empty() => expressions,
        other => return Err(refused(format!("{other} is not supported"))),
    };
    let mut columns = Vec::new();
    for expr in expressions {
        match scope.column(expr)? {
            Some(column) if columns.contains(&column) => {
                return Err(refused(format!("{expr} stands twice in GROUP BY")));
            }
            Some(column) => columns.push(column),
            None => return Err(refused(format!("{expr} in GROUP BY is not a plain column"))),
        }
    }
    Ok(columns)
}

fn group_mismatch(columns: &[String], group: &[String]) -> Refusal {
    let list = |columns: &[String]| match columns {
        [] => "no column".to_owned(),
        _ => columns.iter().map(|name| super::scope::display_identifier(name)).collect::<Vec<_>>().join(", "),
    };
    Refusal::new(
        format!("the select list has {} but GROUP BY has {}", list(columns), list(group)),
        "name the same columns in both, in the same order: it is the order of the values in a hash field",
    )
}
