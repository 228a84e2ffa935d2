// Tables, pictures and settings of a report.
import type { Data, Table } from "./data";

export function TableView({ table }: { table: Table }) {
  return (
    <section class="card" aria-label={table.title}>
      <div class="wide" tabIndex={0} role="region" aria-label={table.title}>
        <table role="table" class={table.columns.length > 3 ? "large" : ""}>
          <caption>{table.title}</caption>
          <thead role="rowgroup">
            <tr role="row">
              {table.columns.map((name, i) => (
                <th key={i} role="columnheader" class={i < table.text_columns ? "text" : ""}>
                  {name}
                </th>
              ))}
            </tr>
          </thead>
          <tbody role="rowgroup">
            {table.rows.map((row, k) => (
              <tr key={k} role="row">
                {row.map((cell, i) => (
                  <td key={i} role="cell" class={i < table.text_columns ? "text" : ""} data-label={table.columns[i]}>
                    {cell}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {table.note ? <p class="note">{table.note}</p> : null}
    </section>
  );
}

export function ReportView({ data }: { data: Data }) {
  return (
    <div class="report">
      {data.links.length ? (
        <section class="card" aria-label="Benchmarks">
          <h2>Benchmarks</h2>
          <ul>
            {data.links.map((link) => (
              <li key={link.href}>
                <a href={link.href}>{link.title}</a>
              </li>
            ))}
          </ul>
        </section>
      ) : null}
      {data.tables.map((table, i) => (
        <TableView key={i} table={table} />
      ))}
      {data.images.map((image) => (
        <section class="card" key={image.title} aria-label={image.title}>
          <h2>{image.title}</h2>
          <img alt={image.title} src={image.source} />
        </section>
      ))}
      {data.about.length ? (
        <section class="card" aria-label="What ran">
          <h2>What ran</h2>
          <dl>
            {data.about.map(([name, value]) => (
              <div key={name}>
                <dt>{name}</dt>
                <dd>{value}</dd>
              </div>
            ))}
          </dl>
          {data.settings ? (
            <details>
              <summary>All settings</summary>
              <pre>{data.settings}</pre>
            </details>
          ) : null}
        </section>
      ) : null}
    </div>
  );
}
