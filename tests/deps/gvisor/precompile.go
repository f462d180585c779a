// SPDX-License-Identifier: Apache-2.0

// Precompile prints the file of gVisor that is its argument, runsc/boot/filter/filter_precompiled.go,
// with the sentry's system call filters in it. gVisor's own build does the same
// (runsc/boot/filter/BUILD), and its releases have them; what the Go module holds is the file without.
// There each sentry would compile its filter while it starts, for some 30 ms.
package main

import (
	"log"
	"os"
	"strings"

	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

const (
	disabled = "PrecompilationDisabledAtBuildTime = true"
	enabled  = "PrecompilationDisabledAtBuildTime = false"
	// The programs are registered after this line.
	programs = "\tprograms := make(map[string]precompiledseccomp.Program)\n"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: precompile FILE")
	}
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	file := string(text)
	if strings.Count(file, disabled) != 1 || strings.Count(file, programs) != 1 {
		log.Fatalf("%s is not the file that is known", os.Args[1])
	}
	compiled, err := config.PrecompiledPrograms()
	if err != nil {
		log.Fatal(err)
	}
	var registered strings.Builder
	for _, program := range compiled {
		registered.WriteString(program.Registration("\t", "precompiledseccomp", "programs"))
	}
	file = strings.Replace(file, disabled, enabled, 1)
	file = strings.Replace(file, programs, programs+registered.String(), 1)
	if _, err := os.Stdout.WriteString(file); err != nil {
		log.Fatal(err)
	}
}
