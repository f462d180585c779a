{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{/* Changes a workload as the values of its part have it. Takes object, part and values. */}}
{{- define "kiln.workload" -}}
{{- $images := .values.images }}
{{- $pod := .object.spec.template.spec }}
{{- range concat ($pod.initContainers | default list) $pod.containers }}
  {{- $name := regexReplaceAll ":[^:/]*$" .image "" }}
  {{- $tag := $images.tag | default (trimPrefix (printf "%s:" $name) .image) }}
  {{- $registry := trimSuffix "/" ($images.registry | default "") }}
  {{- $_ := set . "image" (printf "%s:%s" (list $registry $name | compact | join "/") $tag) }}
  {{- if $images.pullPolicy }}
    {{- $_ := set . "imagePullPolicy" $images.pullPolicy }}
  {{- end }}
{{- end }}
{{- with $images.pullSecrets }}
  {{- $secrets := list }}
  {{- range . }}{{ $secrets = append $secrets (dict "name" .) }}{{ end }}
  {{- $_ := set $pod "imagePullSecrets" $secrets }}
{{- end }}
{{- with .part.nodeSelector }}
  {{- $_ := set $pod "nodeSelector" (merge (deepCopy .) ($pod.nodeSelector | default dict)) }}
{{- end }}
{{- with .part.tolerations }}
  {{- $_ := set $pod "tolerations" (concat ($pod.tolerations | default list) .) }}
{{- end }}
{{- with .part.resources }}
  {{- $_ := set (first $pod.containers) "resources" . }}
{{- end }}
{{- if .values.metrics.scrapeAnnotations }}
  {{- range (first $pod.containers).ports }}
    {{- if eq .name "metrics" }}
      {{- $scrape := dict "prometheus.io/scrape" "true" "prometheus.io/port" (toString .containerPort) "prometheus.io/path" "/metrics" }}
      {{- $_ := set $.object.spec.template.metadata "annotations" $scrape }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The objects of a file, changed as the values have it. Takes file, root. */}}
{{- define "kiln.objects" -}}
{{- $values := .root.Values }}
{{- range splitList "\n---\n" (.root.Files.Get .file) }}
{{- $object := fromYaml (printf "%s\n" .) }}
{{- $labels := merge (dict "app.kubernetes.io/part-of" "kiln") ($object.metadata.labels | default dict) }}
{{- $_ := set $object.metadata "labels" $labels }}
{{- if eq $object.kind "Deployment" }}
  {{- $part := ternary "router" "controller" (eq $object.metadata.name "sandbox-router-deployment") }}
  {{- include "kiln.workload" (dict "object" $object "part" (index $values $part | default dict) "values" $values) }}
{{- else if eq $object.kind "DaemonSet" }}
  {{- include "kiln.workload" (dict "object" $object "part" $values.agent "values" $values) }}
{{- else if and (eq $object.kind "ConfigMap") (eq $object.metadata.name "kiln-node-agent") $values.agent.config }}
  {{- $_ := set $object.data "agent.toml" $values.agent.config }}
{{- end }}
{{- $left_out := or (and (eq $object.kind "Namespace") (not $values.createNamespace)) (and (eq $object.kind "RuntimeClass") (not $values.runtimeClass)) }}
{{- if not $left_out }}
---
{{ toYaml $object }}
{{- end }}
{{- end }}
{{- end }}
